"""``harness recalibrate``: measure again what was measured before, with the recorded settings and plan, on what is here now."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.engines.registry import policy_of
from harness.engines.settings import asked_flash
from harness.errors import CannotWriteError, HarnessError, NotFoundError, UnavailableError, UntrustedError, UsageError
from harness.fit.load_plan import DEFAULT_BATCH, BatchLimits, slot_limits, still_covers
from harness.inventory.installed import Installed
from harness.inventory.weights import calibrations_of
from harness.maintain.diff import Pair, drift_of
from harness.measure.calibrate import Session
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration, artifact_name
from harness.model.record import LoadRequest, Machine
from harness.options import Overrides, RunOptions
from harness.prediction.drift import Change, Drift
from harness.prediction.staleness import Environment, Staleness, age, matching_gpu
from harness.store.catalog import pinned_image
from harness.store.store import RUNS, Store, key_of, model_stem, stem_of, variant_of, write_atomically
from harness.store.trust import by_digest, handed, handed_env, refuse
from harness.text import release, written

#: Below the store's runs: what an unfinished recalibration has done.
JOURNAL: Final = "recalibrate.json"


class SurveyedCalibration(msgspec.Struct, frozen=True, kw_only=True):
    """One calibration of the store, and the loads that would measure it again.

    ``answers`` is the variant that answers for the GPU here, where this one does not.
    """

    key: str
    path: Path
    calibration: Calibration
    age: Staleness
    loads: tuple[LoadRequest, ...] = ()
    answers: str | None = None

    @property
    def stale(self) -> bool:
        """Whether something that can be compared differs."""
        return bool(self.age.reasons) and self.answers is None

    @property
    def imported(self) -> bool:
        """Whether it was imported, so that harness cannot measure it again."""
        return self.calibration.metadata.machine.sandbox == "unknown"


class Recalibration(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one calibration; ``drift`` is from the old artifact to the new one.

    ``narrower``: measured, and valid to fewer tokens than before, so the old one stays.
    """

    target: SurveyedCalibration
    status: Literal["done", "failed", "narrower", "done-before"]
    record: Path | None = None
    new: Calibration | None = None
    drift: Drift | None = None
    error: HarnessError | None = None

    def pair(self) -> Pair:
        """The calibration before and after."""
        return Pair(key=self.target.key, old=self.target.calibration, new=self.new, drift=self.drift)


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, and the run that each finished calibration stands on."""

    asked: tuple[str, ...]
    done: dict[str, str] = {}


def survey(
    store: Store, models: Sequence[str], finder: Installed, engine: str | None, warn: Callable[[str], None]
) -> list[SurveyedCalibration]:
    """The calibrations of ``models`` (none: all of the store), and what of them is not as it is here.

    Raises:
        NotFoundError: a model that the store does not have. UsageError: several engines have it.
    """
    found: list[tuple[Path, Calibration]] = []
    for model in models:
        more = calibrations_of(store, model, engine)
        if not more:
            raise NotFoundError(store.missing(model), code="no-calibration")
        found += [one for one in more if one not in found]
    if not models:
        found = [(one.path, one.calibration) for one in store.entries(warn)]
        found = [(path, one) for path, one in found if engine is None or one.engine == engine]
    targets = []
    for path, calibration in found:
        here = finder.here(calibration)
        known = age(calibration, here)
        if (beyond := _beyond_range(calibration)) is not None:
            known = msgspec.structs.replace(known, reasons=(*known.reasons, beyond))
        targets.append(
            SurveyedCalibration(
                key=key_of(calibration, path),
                path=path,
                calibration=calibration,
                age=known,
                loads=next_plan(calibration, here),
                answers=_answers(path, calibration, store, finder),
            )
        )
    return targets


def _answers(path: Path, calibration: Calibration, store: Store, finder: Installed) -> str | None:
    """The other variant that was measured on a GPU of here, where this one was not: it is this one's that answers elsewhere."""
    now = finder.gpus_of(calibration.metadata.machine.meter)
    if not now or _is_here(calibration.metadata.machine, finder):
        return None
    for other, sibling in store.find(calibration.id):
        if other != path and sibling.metadata.machine.gpus and _is_here(sibling.metadata.machine, finder):
            return variant_of(other) or "the default"
    return None


def _is_here(machine: Machine, finder: Installed) -> bool:
    return all(matching_gpu(gpu, finder.gpus_of(machine.meter) or ()) for gpu in machine.gpus)


def plan_of(calibration: Calibration) -> tuple[LoadRequest, ...]:
    """The loads that a calibration stands on."""
    loads = calibration.metadata.quality.loads
    return tuple(dict.fromkeys(LoadRequest(context=load.context, num_batch=load.num_batch) for load in loads))


def asked_contexts(calibration: Calibration) -> tuple[int, ...]:
    """The contexts that a calibration was asked for: those of the batch that has the most loads, the larger of two."""
    loads = plan_of(calibration)
    count = Counter(load.num_batch or 0 for load in loads)
    batch = max(count, key=lambda one: (count[one], one), default=0)
    return tuple(load.context for load in loads if (load.num_batch or 0) == batch)


def asked_batch(calibration: Calibration) -> int | None:
    """The batch that all loads were asked to have; ``None``: it was left to the engine, whose rule may be another one now.

    Asked for is a batch that the engine's rule would not have chosen: a larger one, or the same beyond its limit.
    """
    quality = calibration.metadata.quality
    batches = {load.num_batch for load in quality.loads}
    batch = batches.pop() if len(batches) == 1 else None
    rule = _batch_rule(calibration, calibration.metadata.engine.version)
    if batch is None or not rule:
        return None if batch == DEFAULT_BATCH else batch
    limits = slot_limits(rule, calibration.metadata.settings.num_parallel)
    longest = max(load.context for load in quality.loads)
    chosen = next((own for limit, own in limits if longest <= limit), limits[-1][1])
    ends = {own: limit for limit, own in limits}
    return batch if batch > chosen or quality.valid_to > ends.get(batch, 0) else None


def _batch_rule(calibration: Calibration, version: str | None) -> BatchLimits:
    metadata = calibration.metadata
    flash = asked_flash(metadata.settings.flash_attention)
    return policy_of(calibration.engine).batch_limits(version, target=metadata.machine.target, flash_attention=flash)


def next_plan(calibration: Calibration, here: Environment) -> tuple[LoadRequest, ...]:
    """The loads that measure it again: those from before, or others where the engine here has another rule for the batch."""
    policy, before = policy_of(calibration.engine), plan_of(calibration)
    version = here.engine or (here.image or "").partition("@")[0].rpartition(":")[2]
    if policy.plans_anew or not asked_contexts(calibration) or release(version) is None:
        return before
    now = policy.plan(
        asked_contexts(calibration),
        calibration.metadata.model.train_context,
        num_batch=asked_batch(calibration),
        batch_limits=_batch_rule(calibration, version),
        num_parallel=calibration.metadata.settings.num_parallel,
    )
    return before if still_covers(before, now) else now


def _beyond_range(calibration: Calibration) -> Change | None:
    """That it stands on loads beyond its range: their batch is not the one that the engine would take there."""
    quality = calibration.metadata.quality
    longest = max((load.context for load in quality.loads), default=0)
    if longest <= quality.valid_to:
        return None
    return Change(name="range", old=f"{quality.valid_to:,} tokens", new=f"its loads reach {longest:,}, at another batch")


def rerun_options(target: SurveyedCalibration, finder: Installed) -> RunOptions:
    """The options that measure a calibration again: its own settings and plan, on what is here.

    Raises:
        UsageError: a value was redacted and is not given, or it was imported. NotFoundError: its GGUF is not here.
        NotPermittedError: it asks for what a file may not set.
    """
    metadata, given = target.calibration.metadata, finder.given
    settings, performance = metadata.settings, metadata.performance
    model = metadata.model.name
    if metadata.machine.sandbox == "unknown":
        raise UsageError(f"{target.key} was imported: harness has not measured it", hint="harness calibrate", code="imported")
    image = finder.image(target.calibration) if metadata.machine.sandbox == "docker" else None
    by_pin = image is not None and image in (given.image, pinned_image(target.calibration.engine, finder.folder))
    from_file = image == metadata.engine.image and not by_pin
    typed = () if from_file else ("image",)
    refuse(target.calibration, finder.folder, given.allowed, target.key, env=given.env, typed=typed)
    _refuse_unnamed(target, given)
    policy = policy_of(target.calibration.engine)
    anew = policy.plans_anew
    by_file = policy.loads_files or model.endswith(".gguf")
    if by_file and model not in finder.catalog.models:
        path = finder.model_path(target.calibration)
        if path is None:
            raise NotFoundError(f"the weights of {target.key} are not here: {model}", hint="--models DIR", code="no-such-model")
        model = str(path)
    if (own := settings.own_model) is not None and own.startswith("/"):
        model = own  # a folder, filed under its name
    return RunOptions(
        model=model,
        engine=target.calibration.engine,
        sandbox=metadata.machine.sandbox,
        contexts=tuple(load.context for load in plan_of(target.calibration)) if anew else asked_contexts(target.calibration),
        loads=() if anew else plan_of(target.calibration),
        num_batch=settings.num_batch if anew else asked_batch(target.calibration),
        kv_cache_type=settings.asked_cache_type,
        flash_attention=asked_flash(settings.flash_attention),
        num_parallel=settings.num_parallel,
        gpus=given.gpus or _gpus(metadata.machine, finder),
        image=by_digest(metadata.engine) if from_file else image,
        engine_binary=given.engine_binary if metadata.machine.sandbox == "process" else None,
        models=given.models,
        env=_env(target, given),
        allowed=given.allowed,
        variant=variant_of(target.path),
        name=None if stem_of(target.path) == artifact_name(model_stem(model)) else written(stem_of(target.path)),
        speed=any((performance.load_s, performance.decode_tokens_per_s, performance.prompt_tokens_per_s)),
        timeout=given.timeout,
        header_only=given.header_only or metadata.weights == "header",
        force=True,  # what may be replaced is decided here, by refuse_other()
    )


def _refuse_unnamed(target: SurveyedCalibration, given: Overrides) -> None:
    """Refuse to measure with the program of harness or on PATH what was measured with one that the user had named."""
    metadata = target.calibration.metadata
    if metadata.machine.sandbox != "docker" and metadata.engine.named and given.engine_binary is None:
        raise UsageError(
            f"{target.key} was measured with a program that was named ({target.calibration.engine} {metadata.engine.version}), "
            "and a calibration may not say which program is run",
            hint="name it again, or its newer version: --engine-binary PATH",
            code="program-not-named",
        )


def _gpus(machine: Machine, finder: Installed) -> str:
    if machine.target == "host":
        return "none"
    twins = [matching_gpu(gpu, finder.gpus() or ()) for gpu in machine.gpus] if machine.meter == "nvml" else []
    found = [twin.uuid for twin in twins if twin is not None and twin.uuid is not None]
    return ",".join(dict.fromkeys(found)) if found and len(found) == len(machine.gpus) else "all"


def _env(target: SurveyedCalibration, given: Overrides) -> dict[str, str]:
    """The variables that it was measured with, and the values that the user gives for them; no others of the user's."""
    settings = target.calibration.metadata.settings
    typed = {name: value for name, value in given.env.items() if name in settings.env}
    return handed_env(settings, typed, target.key)


def refuse_other(target: SurveyedCalibration, session: Session, force: bool) -> None:
    """Refuse to put another machine's figures in the place of these.

    Raises:
        UnavailableError: it was measured on a GPU, and none is used here. CannotWriteError: it would be another GPU or target.
    """
    then, now = target.calibration.metadata.machine, session.choice.machine()
    if then.target == "gpu" and now.target == "host":
        raise UnavailableError(f"{target.key} was measured on a GPU, and there is none here to use", code="no-such-gpu")
    if force:
        return
    differs: list[tuple[str, str, str]] = [("target", then.target, now.target), ("meter", then.meter, now.meter)]
    differs.append(("GPU", ", ".join(gpu.name for gpu in then.gpus), ", ".join(gpu.name for gpu in now.gpus)))
    other = [f"{name} {old or 'none'}, here {new or 'none'}" for name, old, new in differs if old != new]
    if other:
        raise CannotWriteError(
            f"{target.key} was measured on another machine: {'; '.join(other)}",
            hint="keep both with harness calibrate --variant NAME, or replace it with --force",
            code="would-overwrite",
        )


def recalibrate(
    targets: Sequence[SurveyedCalibration],
    store: Store,
    finder: Installed,
    observer: Observer,
    *,
    asked: Sequence[str],
    force: bool = False,
) -> list[Recalibration]:
    """Measure each target again. One that fails stops none of the others; what an interrupted run had done is not done again.

    The old artifact is replaced only by a new one that is to be trusted; the old record stays.
    """
    journal = _journal(store, tuple(asked))
    outcomes: list[Recalibration] = []
    for number, target in enumerate(targets, 1):
        if journal.done.get(target.key) == target.calibration.metadata.run is not None:
            observer.say(f"[{number}/{len(targets)}] {target.key}: done before the interruption")
            outcomes.append(Recalibration(target=target, status="done-before"))
            continue
        observer.say(f"[{number}/{len(targets)}] {target.key}")
        try:
            outcome = _again(target, store, finder, observer, force)
        except HarnessError as error:
            observer.warn(error.message)
            outcomes.append(Recalibration(target=target, status="failed", error=error))
            continue
        outcomes.append(outcome)
        if outcome.error is not None:
            observer.warn(outcome.error.message)
        elif outcome.new is not None and outcome.new.metadata.run is not None:
            journal = msgspec.structs.replace(journal, done={**journal.done, target.key: outcome.new.metadata.run})
            write_atomically(store.root / RUNS / JOURNAL, msgspec.json.format(msgspec.json.encode(journal), indent=1))
    with suppress(OSError):
        (store.root / RUNS / JOURNAL).unlink()
    return outcomes


def _again(target: SurveyedCalibration, store: Store, finder: Installed, observer: Observer, force: bool) -> Recalibration:
    options = rerun_options(target, finder)
    observer.say(f"handed to {target.calibration.engine}: {handed(options.model, options.image, options.env)}")
    session = prepare(options, store, finder.folder)
    refuse_other(target, session, force)
    if session.artifact != target.path:
        raise CannotWriteError(f"{target.path} does not stand where {session.artifact.name} is filed", code="other-model")
    measured: list[Calibration] = []

    def accept(new: Calibration) -> None:
        measured.append(new)
        if not force:
            refuse_narrower(target, new)

    error: HarnessError | None = None
    try:
        session.calibrate(observer, accept=accept)
    except UntrustedError as refused:
        if not measured:
            raise
        error = refused
    (new,) = measured
    return Recalibration(
        target=target,
        status="done" if error is None else "narrower",
        record=None if new.metadata.run is None else store.run_folder(new.metadata.run) / "record.json",
        new=new,
        drift=drift_of(target.calibration, new),
        error=error,
    )


def refuse_narrower(target: SurveyedCalibration, new: Calibration) -> None:
    """Refuse to put a calibration in the place of one that answers for longer contexts.

    Raises:
        UntrustedError: it would; the record is kept.
    """
    then, now = target.calibration.metadata.quality.valid_to, new.metadata.quality.valid_to
    if now < then:
        why = next((note.partition(": ")[2] for note in new.metadata.quality.notes if note.startswith("valid to ")), None)
        raise UntrustedError(
            f"{target.key}: measured again, it is valid to {now:,} tokens, before to {then:,}"
            f"{f' ({why})' if why else ''}; the calibration from before stays",
            hint=f"to take the shorter range: harness recalibrate {shlex.quote(target.key)} --force",
            code="lost-range",
        )


def _journal(store: Store, asked: tuple[str, ...]) -> Journal:
    """The journal of an interrupted run that was asked for the same; otherwise a new one."""
    try:
        found = msgspec.json.decode((store.root / RUNS / JOURNAL).read_bytes(), type=Journal)
    except (OSError, msgspec.DecodeError):
        return Journal(asked=asked)
    return found if found.asked == asked else Journal(asked=asked)
