"""``harness export``: models with the settings that fit, as other programs read them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.registry import policy_of
from harness.errors import HarnessError, NotFoundError, OffloadLikelyError, UnknownVerdictError
from harness.exports.entry import Entry
from harness.exports.formats import write
from harness.inventory.machine import LocalMachine
from harness.options import Allowed
from harness.prediction.host import HostMemory
from harness.prediction.packing import PackedModel, pack
from harness.prediction.together import judge_together
from harness.prediction.tuning import Choice, Demand
from harness.serving.calibration_lookup import CalibrationFilter, read_question
from harness.serving.tuning import settled, tune
from harness.store.catalog import pinned_image
from harness.store.store import Store
from harness.store.trust import by_digest, handed_env, is_own_folder, refuse
from harness.units import MAX_CONTEXT

#: Sets of models that stay loaded together, at most.
_SETS: Final = 32
#: What a file of another program can hold of a choice.
_WRITTEN: Final = frozenset({"kv-cache", "batch"})


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """A file's text, what it holds, and what was left out of it and why."""

    text: str
    entries: tuple[Entry, ...]
    together: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]


def export(
    name: str,
    specs: Sequence[str],
    store: Store,
    machine: LocalMachine,
    *,
    style: str | None = None,
    wanted: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
    num_parallel: int = 1,
    folder: str = "/models",
    allowed: Allowed | None = None,
) -> Exported:
    """Models in a format; of all calibrated ones, those that cannot be written are left out with a warning.

    Args:
        name: of the format.
        specs: ``MODEL`` for the largest context that fits, ``MODEL@CTX`` for one that has to; empty: every calibrated model.
        store: where calibrations are.
        machine: what is free where ``available`` is ``None``.
        style: of the format.
        wanted: which calibrations and settings.
        available: bytes of each device.
        num_parallel: slots.
        folder: where files of weights are.
        allowed: what the calibrations may set beyond the list.

    Raises:
        OffloadLikelyError, UnknownVerdictError: a model that was named does not fit, or is not calibrated. UsageError: the
            format cannot hold it. NotPermittedError: a calibration asks for what a file may not set.
    """
    entries: list[Entry] = []
    memories: list[tuple[tuple[int, ...], HostMemory]] = []
    warnings: list[str] = []
    failure: HarnessError | None = None
    for spec in specs or sorted(store.ids()):
        try:
            one, free, said = _entry(
                spec, store, machine, wanted or CalibrationFilter(), available, num_parallel, folder, allowed or Allowed()
            )
            if not specs:
                write(name, style, [one])
        except HarnessError as error:
            if specs:
                raise
            failure = error
            warnings.append(f"{spec} is left out: {error.message}")
            continue
        entries.append(one)
        memories.append(free)
        warnings += said
    if not entries:
        raise failure or NotFoundError(f"no calibrations in {store.root}", hint="harness calibrate", code="no-calibration")
    together = _together(entries, memories)
    text = write(name, style, entries, together)
    return Exported(text=text, entries=tuple(entries), together=tuple(together), warnings=tuple(dict.fromkeys(warnings)))


def _entry(
    spec: str,
    store: Store,
    machine: LocalMachine,
    wanted: CalibrationFilter,
    available: tuple[int, ...] | None,
    slots: int,
    folder: str,
    allowed: Allowed,
) -> tuple[Entry, tuple[tuple[int, ...], HostMemory], tuple[str, ...]]:
    question = read_question(spec, MAX_CONTEXT)
    context = None if question.context == MAX_CONTEXT else question.context
    demand = Demand(context=context, num_parallel=slots)
    found = tune(question.model, store, machine, demand, wanted=wanted, available=available)
    choice = next((one for one in found.tuning.choices if one.meets and _can_be_written(one)), None)
    if choice is None:
        if found.beyond is not None:
            raise UnknownVerdictError(found.beyond)
        raise OffloadLikelyError(
            f"{question.model} does not fit" + (f" at {context:,} tokens" if context else ""),
            hint=f"what would make it fit: harness tune {shlex.quote(spec)}",
            code="does-not-fit",
        )
    chosen = settled(found, choice)
    calibration, free = chosen.calibration, found.tuning.available
    typed = ("weights",) if is_own_folder(calibration) else ()
    refuse(calibration, Path.cwd(), allowed, choice.calibration, typed=typed)
    handed_env(calibration.metadata.settings, {}, choice.calibration)
    policy = policy_of(calibration.engine)
    (verdict,), _ = judge_together(
        [(calibration, context or choice.context, slots, policy)], free, names=chosen.names, host=found.host
    )  # fmt: skip
    verdict = msgspec.structs.replace(verdict, source=choice.source)
    engine = calibration.metadata.engine
    in_container = calibration.metadata.machine.sandbox == "docker"
    entry = Entry(
        model=calibration.metadata.model.name,
        key=choice.calibration,
        calibration=calibration,
        verdict=verdict,
        derived=choice.derived,
        start=policy.start(calibration, verdict, free),
        image=by_digest(engine) if in_container else pinned_image(calibration.engine, Path.cwd()),
        folder=folder,
    )
    bound = f"{calibration.metadata.model.name} at {verdict.context:,} tokens takes at most what is set aside for it"
    return entry, (free, found.host), (*chosen.warnings, *((bound,) if verdict.at_most else ()))


def _can_be_written(choice: Choice) -> bool:
    return choice.verdict == "fits" and {change.setting for change in choice.changes} <= _WRITTEN


def _together(entries: Sequence[Entry], memories: Sequence[tuple[tuple[int, ...], HostMemory]]) -> list[tuple[int, ...]]:
    """Positions of the largest sets of models that stay resident beside each other.

    Only models of one memory are put together: those that were judged by the same devices and target.
    """
    found: list[tuple[int, ...]] = []
    places: dict[tuple[tuple[int, ...], bool], list[int]] = {}
    for index, (entry, (memory, _)) in enumerate(zip(entries, memories, strict=True)):
        places.setdefault((memory, entry.on_gpu), []).append(index)
    for (memory, _), some in places.items():
        models = []
        for entry in (entries[index] for index in some):
            verdict, rules = entry.verdict, policy_of(entry.calibration.engine)
            size, reserve = verdict.required_bytes or 0, min((one.reserve_bytes for one in verdict.devices), default=0)
            models.append(PackedModel(entry.calibration, verdict.context, verdict.num_parallel, rules, size, reserve))
        packed = pack(models, memory, shown=_SETS, host=memories[some[0]][1])
        found += [tuple(sorted(some[member] for member in one.members)) for one in packed.found]
    return found
