"""Several models on one memory, started one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import msgspec

from harness.model.calibration import Calibration
from harness.prediction.forced import NOTHING, Forced, judge_as_asked
from harness.prediction.host import HostMemory, with_host
from harness.prediction.rules import LoadedModel, Reason, Rules
from harness.prediction.verdict import Verdict, largest_where, named

Fate = Literal["resident", "offload", "evicted"]


def judge_together(
    requests: Sequence[tuple[Calibration, int, int, Rules]],
    available: tuple[int, ...] | None,
    *,
    forced: Forced = NOTHING,
    extrapolate: bool = False,
    names: tuple[str, ...] | None = None,
    search: bool = True,
    loaded: Sequence[tuple[Rules, LoadedModel]] = (),
    host: HostMemory = HostMemory(),  # noqa: B008 - frozen
) -> tuple[list[Verdict], list[Fate | None]]:
    """Several models, started in this order: does each find room beside those before it?

    A request is (calibration, context, slots, rules of its engine). ``loaded`` are models that engines hold already, in the
    order in which they go: what they take is not in ``available``, and is free again once they are ended. ``host`` is memory
    beside GPUs, of which each model takes its part, too.

    Ollama >= 0.30 ends models that were started earlier when its own estimate of the next one is above 80 % of what is free;
    llama-server takes no notice of others, so a later model is offloaded. No engine ends models of another. A fate is ``None``
    where it is not known.

    Raises:
        ValueError: a context or slots below one.
    """
    verdicts: list[Verdict] = []
    fates: list[Fate | None] = []
    known = None if not available else named(available, names)
    free = dict(zip(known or (), available or (), strict=True))
    running: list[tuple[int | None, Rules, LoadedModel]] = [(None, *one) for one in loaded]
    for index, (calibration, context, num_parallel, rules) in enumerate(requests):
        reasons: tuple[Reason, ...] = ()
        own = [one for one in running if one[1].name == rules.name]
        if known and own:
            reasons = rules.evicted(calibration, context, num_parallel, _left(free), known, [model for *_, model in own])
        for place, _, gone in own[: len(reasons)]:
            running = [one for one in running if one[2] is not gone]
            for name, size in gone.on_devices.items():
                free[name] += size
            if place is not None:
                fates[place] = "evicted"
        rest = _left(free) if known else None
        left = host.beside(verdicts[place] for place, *_ in running if place is not None)
        judged = partial(
            judge_as_asked, calibration, num_parallel=num_parallel, available=rest, rules=rules, forced=forced,
            extrapolate=extrapolate, names=known, env=host.environments.get(rules.name),
        )  # fmt: skip
        alone = judged(context, search=search)
        verdict = _on_both_sides(calibration, alone, left, judged)
        verdicts.append(msgspec.structs.replace(verdict, reasons=(*reasons, *verdict.reasons)) if reasons else verdict)
        fates.append({"fits": "resident", "offload": "offload", "unknown": None}[verdict.verdict])
        if verdict.verdict != "unknown" and known:
            taken = _taken(alone, known)
            running.append((index, rules, LoadedModel(name=verdict.model, on_devices=taken)))
            for name, size in taken.items():
                free[name] -= size
    return verdicts, fates


def _on_both_sides(calibration: Calibration, alone: Verdict, host: HostMemory, judged: Callable[..., Verdict]) -> Verdict:
    """A verdict with host memory judged, and its largest context where the host cannot hold what is there at that one."""
    verdict = with_host(alone, host.available, host.growth)
    if not verdict.max_context or verdict.basis == "host" or host.available is None:
        return verdict

    def fits(context: int) -> bool:
        return with_host(judged(context, search=False), host.available).verdict == "fits"

    most = verdict.max_context
    return verdict if fits(most) else msgspec.structs.replace(verdict, max_context=largest_where(calibration, fits))


def _left(free: dict[str, int]) -> tuple[int, ...]:
    return tuple(max(size, 0) for size in free.values())


def _taken(verdict: Verdict, names: tuple[str, ...]) -> dict[str, int]:
    """What a model that runs takes of each device: one that fits what it needs, one that spills all but the reserve."""
    whole = verdict.verdict == "fits"
    if not verdict.devices:  # host memory, or an engine that takes the same of each
        held = max((verdict.available_bytes or 0) - (verdict.reserve_bytes or 0), 0)
        return {names[0]: (verdict.required_bytes or 0) if whole else held}
    return {
        one.name: one.required_bytes if whole else max(one.available_bytes - one.reserve_bytes, 0) for one in verdict.devices
    }
