"""``harness calibrate``: a clean engine, a few loads, a record, and the artifact that follows from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness import __version__
from harness.engines.base import Engine, Options, Source
from harness.errors import BusyError, CannotWriteError, EngineError, UnavailableError, UntrustedError
from harness.fit.load_plan import is_point, needs_plans
from harness.fit.observations import logged_bytes, refuse_disturbed
from harness.fit.speed import with_speeds_of
from harness.inventory.backend import Backend
from harness.inventory.digests import cached_sha256
from harness.measure.buffers import buffers_of, planner_of
from harness.measure.dry_runs import measure_splits
from harness.measure.events import Observer
from harness.measure.interference import interference_notes, refuse_blind, refuse_unwatched
from harness.measure.kills import expected_bytes, refuse_killed
from harness.measure.load import LoadRunner, StageHook, no_hook
from harness.measure.overwrite import refuse_overwrite
from harness.measure.plan import CalibrationPlan, Request, plan_calibration
from harness.measure.quick import first_load, planned_loads
from harness.measure.setup import lock_names, opened
from harness.measure.speed import SpeedLoad, speed_loads
from harness.measure.timing import seconds_spent
from harness.meters.base import Meter
from harness.model.calibration import Calibration, artifact_name
from harness.model.facts import LoadFacts
from harness.model.record import EngineVersion, Load, LoadRequest, Record
from harness.model.trace import Occupancy
from harness.sandboxes.base import Sandbox
from harness.sandboxes.locks import hold
from harness.store.run_folder import RunFolder
from harness.store.store import Store

#: How often a load is made again during which other processes used a GPU that is measured as a whole.
REPEATS: Final = 2


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration left behind. ``spent``: where its seconds went, by what they were spent on."""

    artifact: Path
    record: Path
    calibration: Calibration
    seconds: float
    spent: dict[str, float] = {}


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration that could begin now."""

    engine: Engine
    choice: Backend
    options: Options
    request: Request
    store: Store
    held: ExitStack = msgspec.field(default_factory=ExitStack)  # what is not to be removed while it is measured

    @property
    def artifact(self) -> Path:
        """The file that it would write."""
        return self.store.path_of(self.engine.name, self.request.stem, self.request.variant)

    def plan(self, source: Source | None = None, version: str | None = None) -> CalibrationPlan:
        """What it would do, without starting anything; with what a started engine has said of the model and of itself."""
        request = self.request if source is None else msgspec.structs.replace(self.request, source=source)
        return plan_calibration(self.engine.policy, request, self.options, version)

    def refuse(self) -> CalibrationPlan:
        """What it would do, after whatever can be refused without starting anything was refused.

        Raises:
            CannotWriteError: it would overwrite another calibration, or the store cannot be written.
        """
        planned, folder = self.plan(), self.artifact.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise CannotWriteError(f"{self.artifact} cannot be written: {folder} is not writable")
        if not self.request.force:
            refuse_overwrite(self.artifact, self.request.source, planned.settings, self.choice.machine(), self.store)
        return planned

    def calibrate(
        self, observer: Observer, hook: StageHook = no_hook, accept: Callable[[Calibration], None] = lambda _: None
    ) -> Result:
        """Measure, record, fit, write, with a sandbox and a meter of its own.

        ``accept`` raises where a calibration is not to take its place.

        Raises:
            HarnessError: as the exit codes say. The record is kept whatever happens; an artifact is written only by success.
        """
        planned = self.plan()  # a context that is refused is refused before a file is hashed
        with self.held, ExitStack() as stack:
            stack.enter_context(hold(lock_names(self.choice)))
            sandbox, meter = stack.enter_context(opened(self.engine, self.choice, self.options, observer))
            for note in planned.notes:
                observer.say(note)
            source = _with_digest(self.request.source, observer)
            self.store.check_writable(self.artifact)
            stack.enter_context(self.store.lock(self.artifact))
            if not self.request.force:
                refuse_overwrite(self.artifact, source, planned.settings, self.choice.machine(), self.store)
            run = Run(self, source, sandbox, meter, observer, hook)
            record = run.go()
            run.steps = run.step + 1
            run.phase("fit")
            calibration = self.engine.policy.fit(record)
            if not self.request.speed and self.artifact.exists():
                calibration = with_speeds_of(calibration, self.store.read(self.artifact))
            accept(calibration)
            self.store.write(self.artifact, calibration)
        return Result(
            artifact=self.artifact,
            record=self.store.run_folder(record.run) / "record.json",
            calibration=calibration,
            seconds=record.seconds or 0.0,
            spent=seconds_spent(record),
        )


def _with_digest(source: Source, observer: Observer) -> Source:
    if source.path is None or source.model.digest is not None or source.weights == "header":
        return source
    observer.progress("hashing the model", 0, None)
    digest = cached_sha256(source.path)
    return msgspec.structs.replace(source, model=msgspec.structs.replace(source.model, digest=digest))


class Run:
    """Makes the loads of a session in order. What they come to is kept here; the record on disk is made of it after each."""

    def __init__(
        self, session: Session, source: Source, sandbox: Sandbox, meter: Meter, observer: Observer, hook: StageHook
    ) -> None:
        self.session, self.source, self.observer, self.hook = session, source, observer, hook
        self.policy, self.machine = session.engine.policy, session.choice.machine()
        in_container = session.choice.sandbox == "docker"
        version = EngineVersion() if in_container else session.engine.version(session.options, None)
        self.engine = msgspec.structs.replace(version, named=session.options.named)
        self.plan = session.plan(source, self.engine.version)
        self.started = datetime.now(UTC)
        self.loads: list[Load] = []
        self.notes: list[str] = []
        self.plan_error: float | None = None
        self.before: Occupancy | None = None
        self.after: Occupancy | None = None
        self.status: Literal["complete", "partial"] = "partial"
        self.ended: tuple[str, float] | None = None
        # The variant is part of the name: in a sweep, one model may be calibrated on several machines in one second.
        variant = f"@{session.request.variant}" if session.request.variant else ""
        name = f"{self.started:%Y%m%dT%H%M%SZ}-{session.engine.name}-{artifact_name(session.request.stem)}{variant}"
        if session.store.run_folder(name).exists():
            name = f"{name}-{self.started.microsecond:06d}"
        self.folder = RunFolder(session.store.run_folder(name))
        self.runner = LoadRunner(
            engine=session.engine, sandbox=sandbox, meter=meter, options=session.options, folder=self.folder.path,
            observer=observer, hook=hook, gpus=session.choice.gpus,
        )  # fmt: skip
        self.step = self.steps = 0

    def phase(self, title: str) -> None:
        """Say that the next step of the run begins."""
        self.step += 1
        self.observer.phase(title, self.step, max(self.step, self.steps))

    def record(self) -> Record:
        """The record of the run as far as it is."""
        ended_at, seconds = self.ended or (None, None)
        return Record(
            run=self.folder.path.name,
            harness_version=__version__,
            started_at=f"{self.started:%Y-%m-%dT%H:%M:%SZ}",
            ended_at=ended_at,
            seconds=seconds,
            status=self.status,
            id=f"{self.session.engine.name}/{artifact_name(self.session.request.stem)}",
            engine_name=self.session.engine.name,
            model=self.source.model,
            engine=self.engine,
            settings=self.plan.settings,
            machine=self.machine,
            reserve_bytes=self.plan.reserve_bytes,
            tensors=self.source.tensors,
            estimate=self.source.estimate,
            batch_limits=self.plan.batch_limits,
            loads=tuple(self.loads),
            before=self.before,
            after=self.after,
            notes=tuple(self.notes),
            weights=self.source.weights,
            source=self.source.header,
            plan_error=self.plan_error,
        )

    def go(self) -> Record:
        """Make all loads; the record says how far it came."""
        self.before = self.runner.take_baseline()
        try:
            on_gpu, speed = self.machine.target == "gpu", self.session.request.speed
            dry_runs = on_gpu and self.policy.has_dry_runs
            self.steps = len(self.plan.loads) + dry_runs + speed * (1 + on_gpu) + 1
            if self.session.engine.persistent:
                self.steps += 1
                self._open()
            self._measure(self.plan.loads)
            self._plan_buffers()
            if dry_runs:
                self.phase("dry runs")
            self._optional("dry runs", self._dry_runs)
            if speed:
                self._optional("speed", self._speed)
            self._end("complete")
        except BaseException:
            self._end("partial")
            raise
        finally:
            self.runner.stop()
        self.after = self.runner.occupancy()
        for note in interference_notes(self.record()):
            self._note(note)
        record = self.record()
        self.session.store.write_record(record)
        self.folder.close()
        return record

    def _plan_buffers(self) -> None:
        """Have compute buffers planned where they may leave the line of the loads; plans are of host memory."""
        record, most = self.record(), self.source.model.train_context
        if self.machine.target != "host" or most is None or not needs_plans(record):
            return
        if (planner := planner_of(self.source, self.session.options)) is None:
            return
        self.steps += 1
        self.phase("plan compute buffers")
        points = [load for load in record.loads if load.request.purpose == "point" and is_point(load, "host")]
        for batch in dict.fromkeys(load.request.num_batch for load in points):
            for load in buffers_of([one for one in points if one.request.num_batch == batch], planner, most):
                self._add(load)

    def _dry_runs(self) -> None:
        if (missing := measure_splits(self.runner, self.source, self.record(), self._add)) is not None:
            self._note(missing)

    def _optional(self, what: str, make: Callable[[], None]) -> None:
        """What adds to memory figures that were measured already: where it fails, these stay, with the reason."""
        try:
            make()
        except (EngineError, UnavailableError, BusyError) as error:
            self._note(f"{what} not measured: {error.message}")
            self.runner.stop()

    def _note(self, note: str) -> None:
        self.observer.warn(note)
        self.notes.append(note)

    def _open(self) -> None:
        """Start an engine that serves all loads, and learn from it what the model is."""
        self.phase(f"start {self.session.engine.name}")
        self.source = self.runner.prepare(self.source)
        self.engine = self.runner.identity or self.engine
        self.plan = self.session.plan(self.source, self.engine.version)
        self._refuse_overwrite()

    def _refuse_overwrite(self, facts: LoadFacts | None = None) -> None:
        session = self.session
        if not session.request.force:
            refuse_overwrite(session.artifact, self.source, self.plan.settings, self.machine, session.store, facts)

    def _identify(self) -> None:
        """What only a started engine says, its version and image, and what of the plan follows from them."""
        found = self.runner.identity
        if found is not None and found != self.engine:
            self.engine, self.plan = found, self.session.plan(self.source, found.version)

    def _measure(self, loads: Sequence[LoadRequest]) -> None:
        """Make the loads that the engine's policy asks for, each knowing those before it."""
        if self.session.options.quick and len(loads) > 1:
            self._measure_one(loads)
            return
        order = self.policy.order(loads, self.record, _free_bytes)
        following = next(order, None)
        while following is not None:
            self.steps += following.added
            if following.skipped is not None:
                self.steps -= 1
                load = Load(request=following.request, outcome="skipped", reason=following.skipped)
                self._add(load)
            else:
                load = self._point(following.request)
            try:
                following = order.send(load)
            except StopIteration:
                return

    def _measure_one(self, loads: Sequence[LoadRequest]) -> None:
        """Make one load; the others are planned."""
        request, options = first_load(loads), self.session.options
        self.steps += 2 - len(loads)
        real = self._point(request)
        if not is_point(real, self.machine.target):
            raise UntrustedError(f"the one load of a quick run cannot be a point of the fit: {real.reason}", code="no-points")
        self.phase("plan the other loads")
        others = [one for one in loads if one != request]
        planned, self.plan_error = planned_loads(real, others, self.source, options, self.machine.target)
        for load in planned:
            self._add(load)

    def _point(self, request: LoadRequest) -> Load:
        batch = f" at batch {request.num_batch:,}" if self.plan.batch_limits else ""
        self.phase(f"load {request.context:,} tokens{batch}")
        load = self._undisturbed(request)
        self._add(load)
        if len(self.loads) == 1:
            self._refuse_overwrite(load.facts)
        reason = load.reason
        if load.facts is not None and load.outcome == "ok":
            reason = self.policy.outcome(load, self.machine.target)
        plateau = load.busy or load.idle
        total = plateau.total_bytes if plateau else None
        if self.machine.meter == "log" and load.facts is not None:
            total = logged_bytes(load, self.record())
        self.observer.point(request.context, request.num_batch, total, reason)
        refuse_blind(load, self.machine.target)
        refuse_unwatched(load, self.machine, self.folder.path)
        return load

    def _undisturbed(self, request: LoadRequest) -> Load:
        """One load. One that was killed, or during which others used the GPU, is made again at once, and kept as failed."""
        repeats = REPEATS
        while True:
            load = self.runner.measure(self.source, request, expected_bytes(self.loads, request))
            try:
                refuse_killed(load, self.folder.path)
                refuse_disturbed(load)
            except (EngineError, UntrustedError) as error:
                self._add(msgspec.structs.replace(load, outcome="failed", reason=error.message))
                repeats -= 1
                if repeats < 0 or (load.outcome == "failed" and repeats < REPEATS - 1):
                    raise
                self.observer.warn(f"{error.message}; this load is made again")
                self.before = self.runner.take_baseline()
            else:
                return load

    def _speed(self) -> None:
        for planned in speed_loads(self.policy, self.source, self.record()):
            self.phase(planned.title)
            self._add(self._timed(planned))

    def _timed(self, planned: SpeedLoad) -> Load:
        if planned.skipped is not None:
            return Load(request=planned.request, outcome="skipped", reason=planned.skipped)
        return self.runner.time_speed(self.source, planned.request, planned.prompts)

    def _add(self, load: Load) -> None:
        self._identify()
        self.loads.append(load)
        self.session.store.write_record(self.record())
        self.hook("recorded")

    def _end(self, status: Literal["complete", "partial"]) -> None:
        self.status, self.ended = status, (f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", self.runner.now())
        self.session.store.write_record(self.record())


def _free_bytes(uuid: str) -> int | None:
    from harness.meters.nvml import free_bytes

    return free_bytes(uuid)
