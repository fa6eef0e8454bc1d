"""``harness tune``: the files of a model that hold here, and the settings that make the most of what is free."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.engines.registry import policy_of
from harness.errors import UnknownVerdictError, UsageError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.prediction.forced import NOTHING
from harness.prediction.host import HostMemory
from harness.prediction.memory import beyond_range
from harness.prediction.settings import AskedSettings, at_batch, derive
from harness.prediction.together import judge_together
from harness.prediction.tuning import Choice, Demand, Tuning
from harness.prediction.tuning import tune as search
from harness.serving.advice import calibrating
from harness.serving.calibration_lookup import CalibrationFilter, CalibrationMatch, CheckRequest, choose
from harness.serving.check import Assessment, host_of
from harness.serving.figures import as_asked
from harness.store.store import Store, key_of


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """The settings for a model; ``chosen`` is the file that answers without a change, ``files`` are all that were looked at.

    ``host`` is the memory beside the devices that it was judged with.
    """

    model: str
    chosen: CalibrationMatch
    files: dict[str, Calibration]
    tuning: Tuning
    host: HostMemory

    @property
    def key(self) -> str:
        """The id of that file, with its variant."""
        return key_of(self.chosen.calibration, self.chosen.path)

    @property
    def exit_code(self) -> int:
        """0 where the demand is met, 4 where it is beyond the calibrated range, else 3."""
        return 0 if self.tuning.best else 3 if self.beyond is None else 4

    @property
    def beyond(self) -> str | None:
        """That the context asked for is beyond the calibrated range, where it is."""
        return beyond_range(self.chosen.calibration, self.tuning.demand.context or 0)

    def to_json(self) -> dict[str, object]:
        """The object of ``tune --json``."""
        tuning, best = self.tuning, self.tuning.best
        return {
            "model": self.model,
            "id": self.chosen.calibration.id,
            "met": best is not None,
            "context": tuning.context,
            "available_bytes": list(tuning.available),
            "short_bytes": tuning.short_bytes,
            "least_bytes": tuning.least_bytes,
            "settings": msgspec.to_builtins(best),
            "choices": msgspec.to_builtins(tuning.choices),
        }


class _ReadOnce(Store):
    """A store whose files of one model are read once, whoever asks for them: there may be a thousand variants."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._found: dict[tuple[str, str | None], list[tuple[Path, Calibration]]] = {}

    def find(self, name: str, engine: str | None = None) -> list[tuple[Path, Calibration]]:
        key = (name, engine)
        if key not in self._found:
            self._found[key] = super().find(name, engine)
        return self._found[key]


def tune(
    model: str,
    store: Store,
    machine: LocalMachine,
    demand: Demand,
    *,
    wanted: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
) -> Tuned:
    """The settings that make the most of ``available`` bytes of each device, or of what is free here.

    Raises:
        UnknownVerdictError: no calibration answers, or what is free is not known. UsageError: several engines have the model.
    """
    wanted, store = wanted or CalibrationFilter(), _ReadOnce(store.root)
    if wanted.forced != NOTHING:
        raise UsageError(
            "tune leaves layers to the engine's own rule", hint="for layers that are placed by hand: harness check"
        )
    query = CheckRequest(model=model, context=demand.context or 1, num_parallel=demand.num_parallel)
    # Which file answers without a change; settings that are asked for narrow the search below.
    first = CalibrationFilter(engine=wanted.engine, variant=wanted.variant, host_available=wanted.host_available)
    chosen = choose(query, store, machine, first, available)
    if isinstance(chosen, str):
        raise UnknownVerdictError(f"UNCALIBRATED: {chosen}", hint=calibrating(model, wanted, store), code="uncalibrated")
    if chosen.available is None:
        raise UnknownVerdictError(chosen.obstacle or "the memory that is free is not known", hint=chosen.advice)
    files = {key_of(chosen.calibration, chosen.path): chosen.calibration}
    if wanted.variant is None:
        files |= {key_of(one, path): one for path, one in store.find(model, wanted.engine) if _alike(one, chosen.calibration)}
    rules = policy_of(chosen.calibration.engine)
    host = host_of([chosen], wanted, machine, here=available is None)
    try:
        tuning = search(
            list(files.items()), chosen.available, demand, rules, names=chosen.names, asked=wanted.asked, host=host
        )  # fmt: skip
    except UnknownVerdictError as error:
        if error.code == "no-such-settings":
            as_asked(chosen.calibration, wanted, demand.num_parallel, next(iter(files)), model, store)  # says what differs
        raise
    return Tuned(model=model, chosen=chosen, files=files, tuning=tuning, host=host)


def as_started(model: str, context: int, found: Tuned) -> Assessment | None:
    """The start that serves a model where its usual settings would be offloaded; ``None`` where no settings do.

    Only what a start alone decides is changed: the KV cache and the context. Clients of a server send batches of their own, and
    the number of slots is what they count on.
    """
    choice = next((one for one in found.tuning.choices if one.verdict == "fits" and _at_start(one)), None)
    if choice is None:
        return None
    chosen = settled(found, choice)
    calibration, rules = chosen.calibration, policy_of(chosen.calibration.engine)
    question = CheckRequest(model=model, context=min(context, choice.context), num_parallel=choice.num_parallel)
    (verdict,), _ = judge_together(
        [(calibration, question.context, question.num_parallel, rules)], chosen.available, names=chosen.names, host=found.host
    )  # fmt: skip
    verdict = msgspec.structs.replace(verdict, source=choice.source)
    return Assessment(request=question, verdict=verdict.verdict, chosen=chosen, details=verdict)


def settled(found: Tuned, choice: Choice) -> CalibrationMatch:
    """The calibration that answers for a choice, with the settings of the choice."""
    calibration = found.files[choice.calibration]
    asked = AskedSettings(kv_cache_type=choice.kv_cache_type)
    calibration = derive(calibration, asked, ggml_caches=policy_of(calibration.engine).ggml_caches).calibration
    if choice.num_batch is not None and len({band.num_batch for band in calibration.metadata.bands}) > 1:
        calibration, _ = at_batch(calibration, choice.num_batch)
    path = found.chosen.path.with_name(f"{choice.calibration.rpartition('/')[2]}.yaml")
    return msgspec.structs.replace(found.chosen, calibration=calibration, path=path, derived=choice.derived)


def _at_start(choice: Choice) -> bool:
    return {change.setting for change in choice.changes} <= {"kv-cache", "context"}


def _alike(one: Calibration, other: Calibration) -> bool:
    """Whether two calibrations differ in settings alone: the same weights, engine, version, devices and meter."""
    mine, theirs = one.metadata, other.metadata
    devices = [
        (metadata.machine.target, metadata.machine.meter, [gpu.name for gpu in metadata.machine.gpus])
        for metadata in (mine, theirs)
    ]
    same = mine.model.digest is not None and mine.model.digest == theirs.model.digest
    return (
        same
        and mine.engine.version == theirs.engine.version
        and devices[0] == devices[1]
        and (mine.settings.env == theirs.settings.env)
    )
