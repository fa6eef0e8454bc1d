"""Several models on one memory, started one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from harness.model.calibration import Calibration
from harness.prediction.forced import NOTHING, Forced, judge_as_asked
from harness.prediction.rules import Rules
from harness.prediction.verdict import Verdict, named

Fate = Literal["resident", "offload", "evicted"]


def judge_together(
    requests: Sequence[tuple[Calibration, int, int, Rules]],
    available: tuple[int, ...] | None,
    *,
    forced: Forced = NOTHING,
    extrapolate: bool = False,
    names: tuple[str, ...] | None = None,
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
        while True:
            rest = None if not available else _rest(available, [verdicts[one] for one in resident], known)
            verdict = judge_as_asked(
                calibration, context, num_parallel, rest, rules, forced, extrapolate=extrapolate, names=known
            )  # fmt: skip
            if not resident or rest is None or not rules.evicts(calibration, context, num_parallel, sum(rest), len(resident)):
                break
            fates[resident.pop(0)] = "evicted"
        verdicts.append(verdict)
        fates.append({"fits": "resident", "offload": "offload", "unknown": None}[verdict.verdict])
        if verdict.verdict != "unknown":
            resident.append(index)
    return verdicts, fates


def _rest(available: tuple[int, ...], running: Sequence[Verdict], names: tuple[str, ...] | None) -> tuple[int, ...]:
    """What models that run leave of each device: one that fits takes what it needs, one that spills all but the reserve."""
    rest = dict(zip(names or (), available, strict=True))
    for verdict in running:
        whole = verdict.verdict == "fits"
        if not verdict.devices:  # host memory, or an engine that takes the same of each
            taken = verdict.required_bytes or 0
            if not whole:
                taken = max((verdict.available_bytes or 0) - (verdict.reserve_bytes or 0), 0)
            first = next(iter(rest))
            rest[first] = max(rest[first] - taken, 0)
        for one in verdict.devices:
            taken = one.required_bytes if whole else max(one.available_bytes - one.reserve_bytes, 0)
            rest[one.name] = max(rest[one.name] - taken, 0)
    return tuple(rest.values())
