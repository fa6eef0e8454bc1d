"""The guardrail in front of whatever starts a model: check, start the engine clean, compare what it did, end it.

Nothing outlives the ``with`` block: the reaper ends the engine whatever happens to this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness import __version__
from harness.engines.policy import Policy
from harness.engines.registry import policy_of
from harness.engines.settings import asked_flash, shown_env
from harness.errors import (
    CannotWriteError,
    EngineError,
    NotFoundError,
    OffloadLikelyError,
    UnknownVerdictError,
)
from harness.inventory.machine import LocalMachine
from harness.measure.calibrate import Session
from harness.measure.engine_log import check_alive, read_facts
from harness.measure.events import Logged, Observer
from harness.measure.load import LoadRunner
from harness.measure.prepare import prepare
from harness.measure.setup import opened
from harness.model.calibration import artifact_name
from harness.model.facts import EngineName, LoadFacts
from harness.model.record import EngineVersion, Load, LoadRequest, Record, Settings
from harness.options import Overrides, RunOptions
from harness.prediction.verdict import Verdict
from harness.prediction.verification import disagreement
from harness.render.verdict import sentence, title
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
from harness.serving.check import Assessment, check_start
from harness.store.catalog import find_catalog, read_catalog
from harness.store.run_folder import new_folder, remove
from harness.store.store import Store
from harness.store.trust import by_digest, handed, handed_env, refuse
from harness.units import CELL_PADDING

OnOffload = Literal["warn", "refuse", "shrink", "tune"]
#: Variables of a served model's command. Each engine has its own below.
ENDPOINT: Final = "HARNESS_ENDPOINT"
CONTEXT: Final = "HARNESS_CONTEXT"
MODEL: Final = "HARNESS_MODEL"


class Server(msgspec.Struct, kw_only=True):
    """A model that is loaded and answers.

    ``endpoint`` is its base URL; ``model`` the name that requests use; ``context`` tokens per slot, as loaded (``shrink`` may
    have made it smaller). ``assessment`` was made before the start, ``facts`` what the log said after it, ``disagreement``
    in what the two differ (``None``: in nothing), ``record`` where that is kept. ``ready_seconds`` is from the engine's start.
    """

    endpoint: str
    engine: EngineName
    model: str
    context: int
    num_parallel: int
    assessment: Assessment
    facts: LoadFacts | None
    observed_placement: str | None
    disagreement: str | None
    record: Path | None
    log: Path
    pids: frozenset[int]
    ready_seconds: float
    _runner: LoadRunner

    @property
    def verdict(self) -> Verdict | None:
        """The verdict before the start; ``None`` for a model without a calibration."""
        return self.assessment.details

    def environment(self) -> dict[str, str]:
        """What a command needs to find it: our own variables, and those that clients of the engine read by themselves."""
        found = {
            ENDPOINT: self.endpoint, CONTEXT: str(self.context), MODEL: self.model,
            "OPENAI_BASE_URL": f"{self.endpoint}/v1", "OPENAI_API_KEY": "harness",
        }  # fmt: skip
        return {**found, **policy_of(self.engine).client_environment(self.endpoint)}

    def check_alive(self) -> None:
        """Raise if the engine has ended.

        Raises:
            EngineError: it has; its last lines are with it.
        """
        if self._runner.running is not None:
            check_alive(self._runner.running, self._runner.engine.policy)


def require_fit(judged: Assessment) -> None:
    """Raise unless a model fits.

    Raises:
        OffloadLikelyError: it would be offloaded to the CPU. UnknownVerdictError: that is not known.
    """
    if judged.verdict == "offload":
        raise OffloadLikelyError(sentence(judged), hint="a smaller --ctx, or --on-offload warn to start it all the same")
    if judged.verdict == "unknown":
        raise UnknownVerdictError(judged.reason or "unknown", hint=judged.advice)


def decide(judged: Assessment, on_offload: OnOffload) -> int:
    """The context to start with, tokens per slot; ``tune`` refuses what no settings make fit.

    Raises:
        OffloadLikelyError: it would be offloaded, and nothing smaller fits or was asked for. UnknownVerdictError: not known.
    """
    asked = judged.request.context
    if judged.verdict == "fits" or on_offload == "warn":
        return asked
    largest = judged.details.max_context if judged.details is not None else None
    if on_offload == "shrink" and largest is not None and largest >= CELL_PADDING:
        return min(largest, asked)
    require_fit(judged)
    return asked


@contextmanager
def serve(
    question: CheckRequest,
    options: RunOptions,
    store: Store,
    *,
    on_offload: OnOffload = "warn",
    wanted: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
    measured_only: bool = False,
    port: int | None = None,
    observer: Observer | None = None,
) -> Iterator[Server]:
    """Check a model, start it in its sandbox, and hold it until the block ends.

    ``options`` say how the engine is started; what they leave open is taken from the calibration, so that the verdict is about
    this start. Verdicts and disagreements are said to ``observer``.

    Raises:
        OffloadLikelyError, UnknownVerdictError: refused. HarnessError: the engine, the model, or the GPU cannot be had.
    """
    watch = observer or Logged()
    machine = LocalMachine(None if options.gpus in ("all", "none") else options.gpus, start_env=options.env)
    judged = check_start(question, options, store, machine, wanted, available, measured_only=measured_only)
    for text in judged.warnings:
        watch.warn(text)
    if on_offload == "tune" and judged.verdict == "offload":
        judged = _tuned(judged, question, store, machine, wanted, available)
    context = decide(judged, on_offload)
    watch.say(title(judged))
    (watch.say if judged.verdict == "fits" else watch.warn)(sentence(judged).removeprefix("WARNING: "))
    if judged.chosen is not None and judged.chosen.derived:
        watch.warn(f"tuned: {'; '.join(judged.chosen.derived)}")
    if context != question.context:
        watch.warn(f"context {context:,} instead of {question.context:,}")
    options = completed(options, judged, store)
    if judged.chosen is not None and judged.chosen.method is None:
        watch.say(f"handed to {judged.chosen.calibration.engine}: {handed(options.model, options.image, options.env)}")
    session = prepare(options, store, Path.cwd())
    for reason in session.choice.reasons:
        watch.say(reason)
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(store, session))
        # What was judged by other memory than this machine's cannot be right or wrong about it.
        promised = judged if available is None else msgspec.structs.replace(judged, details=None)
        server = stack.enter_context(_started(session, promised, context, port, folder, watch))
        server.assessment = judged
        if server.disagreement is not None:
            watch.warn(f"the verdict was wrong: {server.disagreement}. Kept in {server.record}")
        elif server.observed_placement is not None:
            watch.say(f"ready after {server.ready_seconds:.1f} s: {server.observed_placement}")
        yield server


def _tuned(
    judged: Assessment,
    question: CheckRequest,
    store: Store,
    machine: LocalMachine,
    wanted: CalibrationFilter | None,
    available: tuple[int, ...] | None,
) -> Assessment:
    """The same model with settings that fit; as it was where none do."""
    from harness.prediction.tuning import Demand
    from harness.serving.tuning import as_started, tune

    demand = Demand(context=question.context, num_parallel=question.num_parallel)
    found = tune(question.model, store, machine, demand, wanted=wanted, available=available)
    return as_started(question.model, question.context, found) or judged


def completed(options: RunOptions, judged: Assessment, store: Store) -> RunOptions:
    """Run options, with what the calibration knows: engine, sandbox, image, model, settings, GPUs.

    Raises:
        NotPermittedError: it asks for what a file may not set. UsageError: a value was redacted, and is not given.
    """
    chosen = judged.chosen
    if chosen is None or chosen.method is not None:
        return options  # an estimate knows nothing of how the model is started
    calibration = chosen.calibration
    metadata = calibration.metadata
    typed = [*(["image"] if options.image is not None else []), *(["weights"] if _is_path(options.model) else [])]
    refuse(calibration, Path.cwd(), options.allowed, str(chosen.path), env=options.env, typed=typed)
    known: dict[str, object] = {"engine": calibration.engine, "model": _model_of(options, judged, store)}
    if options.sandbox == "auto" and metadata.machine.sandbox != "unknown":
        known["sandbox"] = metadata.machine.sandbox
    if options.image is None and metadata.machine.sandbox == "docker":
        known["image"] = by_digest(metadata.engine)
    if options.kv_cache_type is None and metadata.settings.asked_cache_type is not None:
        known["kv_cache_type"] = metadata.settings.kv_cache_type
    if options.flash_attention == "auto":
        known["flash_attention"] = asked_flash(metadata.settings.flash_attention)
    if options.gpus == "all" and metadata.machine.target == "host":
        known["gpus"] = "none"
    elif options.gpus == "all" and chosen.gpus and metadata.machine.meter == "nvml":
        known["gpus"] = ",".join(gpu.uuid or gpu.key for gpu in chosen.gpus)
    env = handed_env(metadata.settings, options.env, str(chosen.path))
    return msgspec.structs.replace(options, env=env, **known)


def _model_of(options: RunOptions, judged: Assessment, store: Store) -> str:
    """What the engine is asked for: a path or name as given; of an id, what it was calibrated from."""
    name, chosen = options.model or "", judged.chosen
    if chosen is None or _is_path(name):
        return name
    calibration = chosen.calibration
    own = calibration.metadata.settings.own_model or calibration.metadata.model.name
    by_file = policy_of(calibration.engine).loads_files or own.endswith(".gguf")
    if not by_file or own in read_catalog(find_catalog(Path.cwd())).models:
        return own
    from harness.inventory.installed import Installed

    given = Overrides(models=options.models, engine_binary=options.engine_binary)
    path = Installed(store, given, Path.cwd()).model_path(calibration)
    if path is None:
        raise NotFoundError(
            f"the weights of {own} were not found where they were calibrated", hint="give their path", code="no-such-model"
        )
    return str(path)


def _is_path(name: str | None) -> bool:
    """Whether the user named a file or folder of weights: a folder by its path, which a name of a model cannot be taken for."""
    path = Path(name or "").expanduser()
    return bool(name) and (path.is_file() or (str(name).startswith(("/", "./", "../", "~")) and path.is_dir()))


@contextmanager
def _folder(store: Store, session: Session) -> Iterator[Path]:
    """A folder for the engine's log; it stays if something went wrong, or holds a record."""
    now = datetime.now(UTC)
    stem = artifact_name(session.request.stem)
    name = f"{now:%Y%m%dT%H%M%SZ}-serve-{session.engine.name}-{stem}-{now.microsecond:06d}"
    folder = store.run_folder(name)
    with new_folder(folder):
        try:
            yield folder
        except EngineError:
            raise  # its log may be wanted
        except BaseException:
            _remove_empty_run(folder)
            raise
        else:
            _remove_empty_run(folder)


def _remove_empty_run(folder: Path) -> None:
    if not (folder / "record.json").exists():
        with suppress(CannotWriteError):  # what is left is marked, and clean finds it
            remove(folder)


@contextmanager
def _started(
    session: Session, judged: Assessment, context: int, port: int | None, folder: Path, watch: Observer
) -> Iterator[Server]:
    options, engine = session.options, session.engine
    env = {**engine.policy.serve_environment(session.request.name, context), **options.env}
    options = msgspec.structs.replace(options, env=env)
    request = request_of(judged, context, options.num_parallel)
    with ExitStack() as stack:
        sandbox, meter = stack.enter_context(opened(engine, session.choice, options, watch))
        runner = LoadRunner(
            engine=engine, sandbox=sandbox, meter=meter, options=options, folder=folder, observer=watch,
            port=port,
        )  # fmt: skip
        stack.callback(runner.stop)
        source = session.request.source
        if engine.persistent and source.path is not None:  # it is given the weights by their digest
            from harness.inventory.digests import cached_sha256

            watch.progress("hashing the model", 0, None)
            model = msgspec.structs.replace(source.model, digest=cached_sha256(source.path))
            source = msgspec.structs.replace(source, model=model)
        watch.phase(f"starting {engine.name}", 1, 1)
        if engine.persistent:
            source = runner.prepare(source, request)
        running = runner.running or runner.start(source, request)
        with runner.client(running) as client:
            engine.load(client, source, request, options)
        ready = runner.now()
        facts = read_facts(running.log, 0, None, engine.policy)
        server = Server(
            endpoint=running.endpoint, engine=engine.name, model=source.own_name or session.request.name, context=context,
            num_parallel=options.num_parallel, assessment=judged, facts=facts,
            observed_placement=None if facts is None else engine.policy.describe(facts, session.choice.target),
            disagreement=_disagreement(judged, context, facts, engine.policy), record=None, log=running.log,
            pids=running.pids(), ready_seconds=ready,
            _runner=runner,
        )  # fmt: skip
        if server.disagreement is not None:
            server.record = _keep(session, runner, request, server, ready)
        yield server


def request_of(judged: Assessment, context: int, num_parallel: int) -> LoadRequest:
    """The load as it was judged."""
    chosen = judged.chosen
    if chosen is None:
        return LoadRequest(context=context, purpose="serve")
    policy = policy_of(chosen.calibration.engine)
    return policy.serve_request(chosen.calibration, context, num_parallel, chosen.available)


def _disagreement(judged: Assessment, context: int, facts: LoadFacts | None, policy: Policy) -> str | None:
    if judged.details is None or facts is None:
        return None
    verdict = judged.details
    if context < judged.request.context:  # it was made smaller so that it fits
        verdict = msgspec.structs.replace(verdict, verdict="fits")
    return disagreement(verdict, facts, policy)


def _keep(session: Session, runner: LoadRunner, request: LoadRequest, server: Server, ready: float) -> Path:
    """A record of a start that did not do as was said."""
    log = server.log
    load = Load(
        request=request, outcome="spilled" if server.verdict and server.verdict.verdict == "fits" else "ok",
        reason=server.disagreement, log=log.name, log_end=log.stat().st_size, facts=server.facts, ready=ready,
    )  # fmt: skip
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    options = session.options
    record = Record(
        run=runner.folder.name,
        harness_version=__version__,
        started_at=now,
        ended_at=now,
        seconds=ready,
        status="complete",
        id=f"{session.engine.name}/{artifact_name(session.request.stem)}",
        engine_name=session.engine.name,
        model=session.request.source.model,
        engine=runner.identity or EngineVersion(version=server.facts.engine_version if server.facts else None),
        settings=Settings(
            num_parallel=options.num_parallel, kv_cache_type=options.kv_cache_type or "f16", env=shown_env(options.env)
        ),
        machine=session.choice.machine(),
        loads=(load,),
        notes=(f"serve: {server.disagreement}", sentence(server.assessment)),
    )
    return session.store.write_record(record)
