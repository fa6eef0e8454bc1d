"""``harness calibrate``: a clean engine, a few loads, a record, and the artifact that follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from harness import __version__
from harness.engines.base import Engine, Options, Source
from harness.engines.settings import shown_env
from harness.errors import BusyError, EngineError, UnavailableError, UsageError
from harness.fit.load_plan import DEFAULT_CONTEXTS, BatchLimits, usable_contexts
from harness.inventory.backend import Choice
from harness.measure.dry_runs import measure_splits
from harness.measure.events import Observer
from harness.measure.interference import interference_notes, refuse_blind, refuse_unwatched
from harness.measure.load import LoadRunner, StageHook, no_hook
from harness.measure.overwrite import refuse_overwrite
from harness.measure.speed import HOST_SPEED_PROMPTS, SPEED_PROMPTS, no_host_speed
from harness.meters.base import Meter
from harness.model.calibration import Calibration, artifact_name
from harness.model.facts import LoadFacts
from harness.model.record import EngineVersion, Load, LoadRequest, Record, Settings
from harness.options import recorded_flash
from harness.sandboxes.base import Sandbox
from harness.store.run_folder import RunFolder
from harness.store.store import Store

#: Physical batch of embedding models, at most the context: Ollama's default for them (llm/llama_server.go).
EMBEDDING_BATCH: Final = 2048


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to calibrate. ``name`` is what the user called the model; ``contexts`` empty means the default plan.

    ``loads`` is a plan that was made before, and leaves nothing to the default one.
    """

    name: str
    source: Source
    contexts: tuple[int, ...] = ()
    loads: tuple[LoadRequest, ...] = ()
    num_batch: int | None = None
    variant: str | None = None
    speed: bool = True
    force: bool = False


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration left behind."""

    artifact: Path
    record: Path
    calibration: Calibration
    seconds: float


class CalibrationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration would do."""

    artifact: Path
    loads: tuple[LoadRequest, ...]


def plan(engine: Engine, request: Request, store: Store, options: Options, version: str | None = None) -> CalibrationPlan:
    """The loads and the file of a calibration, without starting anything; of the newest engine where it is not known.

    Raises:
        UsageError: a context beyond the model's training context, or no context at all.
    """
    train = request.source.model.train_context
    beyond = [context for context in request.contexts if train is not None and context > train]
    if beyond:
        raise UsageError(
            f"{request.name} was trained on {train} tokens; a context of {max(beyond)} is beyond that",
            hint=f"use --ctx up to {train}",
            code="beyond-training",
        )
    contexts = request.contexts or DEFAULT_CONTEXTS
    batch = request.num_batch
    if request.source.embedding and batch is None:
        batch = min(EMBEDDING_BATCH, *usable_contexts(contexts, train))
    limits, slots = batch_rule(engine, options, version), options.num_parallel
    loads = request.loads or engine.policy.plan(contexts, train, num_batch=batch, batch_limits=limits, num_parallel=slots)
    return CalibrationPlan(artifact=store.path_of(engine.name, model_stem(request.name), request.variant), loads=loads)


def batch_rule(engine: Engine, options: Options, version: str | None) -> BatchLimits:
    """The engine's rule for the physical batch, where it is unset."""
    return engine.policy.batch_limits(version, target=options.target, flash_attention=options.flash_attention)


def model_stem(name: str) -> str:
    """The name under which a model is filed: of a GGUF path the file's stem, of a folder's its name."""
    if name.endswith(".gguf"):
        return Path(name).stem
    return Path(name).expanduser().resolve().name if name.startswith(("/", "./", "../", "~")) else name


def calibrate(
    engine: Engine,
    sandbox: Sandbox,
    meter: Meter,
    choice: Choice,
    options: Options,
    request: Request,
    store: Store,
    observer: Observer,
    *,
    hook: StageHook = no_hook,
) -> Result:
    """Measure, record, fit, write.

    Raises:
        HarnessError: as the exit codes say. The record is kept whatever happens; an artifact is written only by success.
    """
    planned = plan(engine, request, store, options)
    settings = Settings(
        num_parallel=options.num_parallel,
        num_batch=request.num_batch,
        kv_cache_type=options.kv_cache_type or engine.policy.default_cache_type,
        flash_attention=recorded_flash(options.flash_attention),
        env=shown_env(options.env),
        vllm=engine.policy.settings(request.source, options, request.num_batch),
    )
    store.check_writable(planned.artifact)
    with ExitStack() as stack:
        stack.enter_context(store.lock(planned.artifact))
        if not request.force:
            refuse_overwrite(planned.artifact, request.source, settings, choice.machine(), store)
        run = Run(engine, sandbox, meter, choice, options, request, store, observer, settings, hook)
        record = run.go()
        observer.phase("fit", run.steps, run.steps)
        calibration = engine.policy.fit(record)
        store.write(planned.artifact, calibration)
    return Result(
        artifact=planned.artifact,
        record=store.run_folder(record.run) / "record.json",
        calibration=calibration,
        seconds=record.seconds or 0.0,
    )


class Run:
    """One run: loads in order, the record on disk after each of them."""

    def __init__(
        self,
        engine: Engine,
        sandbox: Sandbox,
        meter: Meter,
        choice: Choice,
        options: Options,
        request: Request,
        store: Store,
        observer: Observer,
        settings: Settings,
        hook: StageHook,
    ) -> None:
        self.engine, self.choice, self.options, self.request = engine, choice, options, request
        self.store, self.observer, self.hook = store, observer, hook
        self.epoch = time.monotonic()
        started = datetime.now(UTC)
        stem = artifact_name(model_stem(request.name))
        self.record = Record(
            # The variant is part of it: in a sweep, one model may be calibrated on several machines in one second.
            run=f"{started:%Y%m%dT%H%M%SZ}-{engine.name}-{stem}{f'@{request.variant}' if request.variant else ''}",
            harness_version=__version__,
            started_at=f"{started:%Y-%m-%dT%H:%M:%SZ}",
            id=f"{engine.name}/{stem}",
            engine_name=engine.name,
            model=request.source.model,
            engine=EngineVersion() if choice.sandbox == "docker" else engine.version(options, None),
            settings=settings,
            machine=choice.machine(),
            reserve_bytes=engine.policy.reserve_bytes(None, options.env),
            tensors=request.source.tensors,
            estimate=request.source.estimate,
            batch_limits=batch_rule(engine, options, None),
        )
        folder = store.run_folder(self.record.run)
        if folder.exists():
            self.record = msgspec.structs.replace(self.record, run=f"{self.record.run}-{time.time_ns() % 1_000_000:06d}")
            folder = store.run_folder(self.record.run)
        self.folder = RunFolder(folder)
        self.runner = LoadRunner(
            engine=engine, sandbox=sandbox, meter=meter, options=options, folder=folder, observer=observer,
            epoch=self.epoch, hook=hook,
        )  # fmt: skip
        self.steps = 1

    def go(self) -> Record:
        """Make all loads; the record says how far it came."""
        self.record = msgspec.structs.replace(self.record, before=self.runner.take_baseline())
        try:
            if self.engine.persistent:
                self._open()
            loads = plan(self.engine, self.request, self.store, self.options, self.record.engine.version).loads
            self.steps = len(loads) + (2 if self.request.speed else 0) + 1
            self._measure(loads)
            if self.record.machine.target == "gpu" and self.engine.policy.has_dry_runs:
                self.observer.phase("dry runs", len(loads), self.steps)
            self._optional("dry runs", lambda: measure_splits(self.runner, self.request.source, self.record, self._add))
            if self.request.speed:
                self._optional("speed", self._speed)
            self._end("complete")
        except BaseException:
            self._end("partial")
            raise
        finally:
            self.runner.stop()
        self._look_back()
        self.folder.close()
        return self.record

    def _optional(self, what: str, make: Callable[[], None]) -> None:
        """What adds to memory figures that were measured already: where it fails, these stay, with the reason."""
        try:
            make()
        except (EngineError, UnavailableError, BusyError) as error:
            note = f"{what} not measured: {error.message}"
            self.observer.warn(note)
            self.record = msgspec.structs.replace(self.record, notes=(*self.record.notes, note))
            self.store.write_record(self.record)
            self.runner.stop()

    def _look_back(self) -> None:
        """Once the engine has ended: what the devices hold now, and who else has used them."""
        self.record = msgspec.structs.replace(self.record, after=self.runner.occupancy())
        notes = interference_notes(self.record)
        for note in notes:
            self.observer.warn(note)
        self.record = msgspec.structs.replace(self.record, notes=(*self.record.notes, *notes))
        self.store.write_record(self.record)

    def _open(self) -> None:
        """Start an engine that serves all loads, and learn from it what the model is.

        Raises:
            CannotWriteError: the model turns out to be another one than the artifact's.
        """
        self.observer.phase(f"start {self.engine.name}", 0, self.steps)
        source = self.runner.prepare(self.request.source)
        self.request = msgspec.structs.replace(self.request, source=source)
        self.record = msgspec.structs.replace(self.record, model=source.model, tensors=source.tensors, estimate=source.estimate)
        self._identify()
        self._refuse_overwrite()

    def _refuse_overwrite(self, facts: LoadFacts | None = None) -> None:
        if not self.request.force:
            path = self.store.path_of(self.engine.name, model_stem(self.request.name), self.request.variant)
            settings, machine = self.record.settings, self.record.machine
            refuse_overwrite(path, self.request.source, settings, machine, self.store, facts)

    def _identify(self) -> None:
        """Note what only a started engine tells: its version and image, and the rules of that version."""
        found = self.runner.identity
        if found is None or found == self.record.engine:
            return
        self.record = msgspec.structs.replace(
            self.record,
            engine=found,
            batch_limits=batch_rule(self.engine, self.options, found.version),
            reserve_bytes=self.engine.policy.reserve_bytes(
                found.version, self.options.env, self.request.source.projector_bytes
            ),
        )

    def _measure(self, loads: Sequence[LoadRequest]) -> None:
        """Make the loads that the engine's policy asks for, each knowing those before it."""
        order = self.engine.policy.order(loads, lambda: self.record, _free_bytes)
        following = next(order, None)
        while following is not None:
            self.steps += following.added
            if following.skipped is not None:
                load = Load(request=following.request, outcome="skipped", reason=following.skipped)
                self._add(load)
            else:
                load = self._point(following.request, following.number)
            try:
                following = order.send(load)
            except StopIteration:
                return

    def _point(self, request: LoadRequest, step: int) -> Load:
        batch = "" if self.record.batch_limits == () else f" at batch {request.num_batch}"
        self.observer.phase(f"load {request.context} tokens{batch}", step, self.steps)
        load = self.runner.measure(self.request.source, request)
        self._add(load)
        if len(self.record.loads) == 1:
            self._refuse_overwrite(load.facts)
        reason = load.reason
        if load.facts is not None and load.outcome == "ok":
            reason = self.engine.policy.outcome(load, self.record.machine.target)
        plateau = load.busy or load.idle
        self.observer.point(request.context, request.num_batch, plateau.total_bytes if plateau else None, reason)
        refuse_blind(load, self.record.machine.target)
        refuse_unwatched(load, self.record.machine, self.runner.folder)
        return load

    def _speed(self) -> None:
        request = self.engine.policy.speed_request(self.record)
        if request is None:
            return
        context = request.context
        prompts = tuple(prompt for prompt in SPEED_PROMPTS if prompt < context - 128) or (32,)
        self.observer.phase("speed", self.steps - 2, self.steps)
        self._add(self.runner.time_speed(self.request.source, request, prompts))
        if self.record.machine.target == "host":
            return
        self.observer.phase("speed on the host alone", self.steps - 1, self.steps)
        request = LoadRequest(context=min(context, 2048), purpose="host-speed")
        if (reason := no_host_speed(self.engine.policy, self.request.source)) is not None:
            self._add(Load(request=request, outcome="skipped", reason=reason))
            return
        self._add(self.runner.time_speed(self.request.source, request, HOST_SPEED_PROMPTS))

    def _add(self, load: Load) -> None:
        self._identify()
        self.record = msgspec.structs.replace(self.record, loads=(*self.record.loads, load))
        self.store.write_record(self.record)
        self.hook("recorded")

    def _end(self, status: str) -> None:
        seconds = round(time.monotonic() - self.epoch, 3)
        self.record = msgspec.structs.replace(
            self.record, status=status, seconds=seconds, ended_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        )
        self.store.write_record(self.record)


def _free_bytes(uuid: str) -> int | None:
    from harness.meters.nvml import free_bytes

    return free_bytes(uuid)


__all__ = ["CalibrationPlan", "Request", "Result", "calibrate", "plan"]
