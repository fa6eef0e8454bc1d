"""Several models on one memory, started one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from harness.model.calibration import Calibration
from harness.prediction.forced import NOTHING, Forced, judge_as_asked
from harness.prediction.rules import LoadedModel, Reason, Rules
from harness.prediction.verdict import Verdict, named

Fate = Literal["resident", "offload", "evicted"]


def judge_together(
    requests: Sequence[tuple[Calibration, int, int, Rules]],
    available: tuple[int, ...] | None,
    *,
    forced: Forced = NOTHING,
    extrapolate: bool = False,
    names: tuple[str, ...] | None = None,
    search: bool = True,
) -> tuple[list[Verdict], list[Fate | None]]:
    """Several models, started in this order: does each find room beside those before it?

    A request is (calibration, context, slots, rules of its engine).

    Ollama >= 0.30 ends models that were started earlier when its own estimate of the next one is above 80 % of what is free;
    llama-server takes no notice of others, so a later model is offloaded. A fate is ``None`` where it is not known.

    Raises:
        ValueError: a context or slots below one.
    """
    verdicts: list[Verdict] = []
    fates: list[Fate | None] = []
    resident: list[int] = []
    known = None if not available else named(available, names)
    for index, (calibration, context, num_parallel, rules) in enumerate(requests):
        rest = None if not available else _rest(available, [verdicts[one] for one in resident], known)
        reasons: tuple[Reason, ...] = ()
        if rest is not None and known is not None and resident:
            loaded = [
                LoadedModel(name=requests[one][0].metadata.model.name, on_devices=_taken(verdicts[one], known))
                for one in resident
            ]
            reasons = rules.evicted(calibration, context, num_parallel, rest, known, loaded)
            for _ in reasons:
                fates[resident.pop(0)] = "evicted"
            rest = _rest(available or (), [verdicts[one] for one in resident], known)
        verdict = judge_as_asked(
            calibration, context, num_parallel, rest, rules, forced, extrapolate=extrapolate, names=known, search=search
        )  # fmt: skip
        verdicts.append(msgspec.structs.replace(verdict, reasons=(*reasons, *verdict.reasons)) if reasons else verdict)
        fates.append({"fits": "resident", "offload": "offload", "unknown": None}[verdict.verdict])
        if verdict.verdict != "unknown":
            resident.append(index)
    return verdicts, fates


def _taken(verdict: Verdict, names: tuple[str, ...]) -> dict[str, int]:
    """What a model that runs takes of each device: one that fits what it needs, one that spills all but the reserve."""
    whole = verdict.verdict == "fits"
    if not verdict.devices:  # host memory, or an engine that takes the same of each
        held = max((verdict.available_bytes or 0) - (verdict.reserve_bytes or 0), 0)
        return {names[0]: (verdict.required_bytes or 0) if whole else held}
    return {
        one.name: one.required_bytes if whole else max(one.available_bytes - one.reserve_bytes, 0) for one in verdict.devices
    }


def _rest(available: tuple[int, ...], running: Sequence[Verdict], names: tuple[str, ...] | None) -> tuple[int, ...]:
    """What models that run leave of each device."""
    rest = dict(zip(names or (), available, strict=True))
    for verdict in running:
        for name, size in _taken(verdict, names or ()).items():
            rest[name] = max(rest[name] - size, 0)
    return tuple(rest.values())
