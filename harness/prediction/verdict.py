"""Will it fit? What the engine will do with a model at a context in the memory that is free, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.memory import Prediction, predict
from harness.prediction.placement import Placed, place
from harness.prediction.rules import Rules, Sized
from harness.units import CELL_PADDING

Fate = Literal["resident", "offload", "evicted"]
#: Where the figures of an answer come from.
Source = Literal["measured", "derived"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context; bytes, tokens, tokens per second. ``None`` is not known.

    ``fits`` says that ``required_bytes + reserve_bytes <= available_bytes`` at the upper end of the prediction interval, with
    ``uncertainty_bytes`` more. ``margin_bytes`` is what is left at the predicted figure, ``short_bytes`` what is missing
    there (0 where nothing is); ``tight`` says that the interval holds both outcomes. ``source`` says whether the
    figures are those of a measured calibration or calculated from one of other settings.
    ``max_context`` is the largest context per slot that fits, 0 where none does. ``layers_total`` counts the output layer.
    """

    model: str
    verdict: Literal["fits", "offload", "unknown"]
    basis: Literal["gpu", "host"]
    required_bytes: int | None
    reserve_bytes: int | None
    available_bytes: int | None
    short_bytes: int | None
    uncertainty_bytes: int | None
    margin_bytes: int | None
    tight: bool
    max_context: int | None
    layers_total: int | None
    layers_offloaded: int | None
    layers_overflowing: int | None
    decode_tokens_per_s: float | None
    context: int
    num_parallel: int
    reason: str | None
    warnings: tuple[str, ...]
    source: Source = "measured"


def judge(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...] | None,
    rules: Rules,
    *,
    extrapolate: bool = False,
) -> Verdict:
    """What the engine will do with a model at ``context`` tokens per slot.

    Args:
        calibration: of the engine, GPU and settings that will run it.
        context: tokens per slot, above zero.
        num_parallel: slots, above zero.
        available: free bytes of each device of the target as read now, before the engine starts (host: one figure, the smaller
            of ``MemAvailable`` and what the cgroup leaves); ``None`` where nothing could be read.
        rules: the engine's.
        extrapolate: also answer beyond the calibrated range, with a warning.

    Raises:
        ValueError: context or slots below one.
    """
    metadata = calibration.metadata
    needed = predict(calibration, context, num_parallel)
    if not needed.within_range and not extrapolate:
        reason = f"a context of {context} is beyond {metadata.quality.valid_to}, the range of this calibration"
        return _unknown(calibration, needed, available, reason, rules)
    if not available:
        return _unknown(calibration, needed, None, "the memory that is free is not known", rules)
    try:
        sized = rules.sized(calibration, needed.context, needed.num_parallel, available)
    except UnknownVerdictError as error:
        return _unknown(calibration, needed, available, error.message, rules)
    if sized is not None:
        return _judge_sized(calibration, needed, sized, rules)
    devices = max(len(metadata.machine.gpus), 1) if metadata.machine.target == "gpu" else 1
    if len(available) != devices:
        reason = f"calibrated on {_devices(devices)}, to be judged on {_devices(len(available))}"
        return _unknown(calibration, needed, None, reason, rules)
    return _judge(calibration, context, num_parallel, sum(available), devices, rules)


def _judge(calibration: Calibration, context: int, num_parallel: int, free: int, devices: int, rules: Rules) -> Verdict:
    rule = rules.placement(calibration)
    batch = rules.batch(calibration, context, num_parallel, free)
    needed = predict(calibration, context, num_parallel, num_batch=batch)
    reserve = rule.reserve_of(needed.overhead_bytes) * devices
    margin = free - needed.total_bytes - reserve
    doubt = needed.uncertainty_bytes
    spills = margin < doubt
    warnings = list(needed.warnings)
    if rule.estimates:
        version = calibration.metadata.engine.version
        warnings.append(f"{rules.title} {version} places layers by its own estimate, which is often above what it then takes")
    if devices > 1:
        warnings.append("judged by the sum over the devices")
    placed: Placed | None = None
    if spills and calibration.metadata.machine.target == "gpu" and devices == 1:
        placed = place(calibration, context, num_parallel, free - reserve, batch, rules)
    layers = calibration.metadata.model.layers
    total = placed.total if placed else None if layers is None else layers + 1
    on_host = calibration.metadata.machine.target == "host"
    return Verdict(
        model=calibration.metadata.model.name,
        verdict="offload" if spills else "fits",
        basis=calibration.metadata.machine.target,
        required_bytes=needed.total_bytes,
        reserve_bytes=reserve,
        available_bytes=free,
        short_bytes=max(-margin, 0),
        uncertainty_bytes=doubt,
        margin_bytes=margin,
        tight=-doubt <= margin < doubt,
        max_context=_largest(calibration, num_parallel, free, devices, rules),
        layers_total=total,
        layers_offloaded=None if on_host else placed.offloaded if placed else None if spills else total,
        layers_overflowing=None if on_host else placed.overflowing if placed else None if spills else 0,
        decode_tokens_per_s=_decode(calibration, placed) if placed or not spills else None,
        context=context,
        num_parallel=num_parallel,
        reason=None,
        warnings=tuple(warnings),
    )


def _judge_sized(calibration: Calibration, needed: Prediction, sized: Sized, rules: Rules) -> Verdict:
    """An engine that offloads nothing starts with what it is given, or not at all."""
    layers = calibration.metadata.model.layers
    total = None if layers is None else layers + 1
    return Verdict(
        model=calibration.metadata.model.name,
        verdict="offload" if sized.short_bytes else "fits",
        basis=calibration.metadata.machine.target,
        required_bytes=sized.required_bytes,
        reserve_bytes=sized.reserve_bytes,
        available_bytes=sized.available_bytes,
        short_bytes=sized.short_bytes,
        uncertainty_bytes=0,
        margin_bytes=sized.available_bytes - sized.required_bytes - sized.reserve_bytes,
        tight=False,
        max_context=sized.max_context,
        layers_total=total,
        layers_offloaded=None if sized.short_bytes else total,
        layers_overflowing=None if sized.short_bytes else 0,
        decode_tokens_per_s=None if sized.short_bytes else _decode(calibration, None),
        context=needed.context,
        num_parallel=needed.num_parallel,
        reason=f"{rules.title} does not start with this: it moves nothing to the CPU" if sized.short_bytes else None,
        warnings=needed.warnings,
    )


def _decode(calibration: Calibration, placed: Placed | None) -> float | None:
    """Tokens per second; the time of a token is the sum over what is on each side."""
    performance = calibration.metadata.performance
    fast, slow = performance.decode_tokens_per_s, performance.host_decode_tokens_per_s
    if calibration.metadata.machine.target == "host":
        return slow if fast is None else fast
    if placed is None or placed.host_work == 0.0:
        return fast
    if not fast or not slow:
        return None
    seconds = (1.0 - placed.host_work) / fast + placed.host_work / slow
    return round(1.0 / seconds, 2)


def largest_context(calibration: Calibration, num_parallel: int, available: tuple[int, ...] | None, rules: Rules) -> int | None:
    """The largest context per slot (whole steps of 256 cells, within the calibrated range) that fits; 0 where none does.

    ``None`` where it cannot be said: nothing was read, or other devices than calibrated. An engine that pages its KV cache has
    steps of its own.

    Raises:
        ValueError: slots below one.
    """
    if num_parallel < 1:
        raise ValueError("slots must be at least 1")
    metadata = calibration.metadata
    devices = max(len(metadata.machine.gpus), 1) if metadata.machine.target == "gpu" else 1
    if not available:
        return None
    try:
        sized = rules.sized(calibration, 1, num_parallel, available)
    except UnknownVerdictError:
        return None
    if sized is not None:
        return sized.max_context
    return _largest(calibration, num_parallel, sum(available), devices, rules) if len(available) == devices else None


def _largest(calibration: Calibration, num_parallel: int, free: int, devices: int, rules: Rules) -> int:
    rule = rules.placement(calibration)

    def fits(context: int) -> bool:
        batch = rules.batch(calibration, context, num_parallel, free)
        needed = predict(calibration, context, num_parallel, num_batch=batch)
        return needed.total_bytes + needed.uncertainty_bytes + rule.reserve_of(needed.overhead_bytes) * devices <= free

    top = calibration.metadata.quality.valid_to
    if fits(top):
        return top
    # Memory grows with the context but for steps down where the engine takes a smaller batch: search between the steps.
    steps = sorted({0, top, *(band.up_to for band in calibration.metadata.bands)})
    for start, end in reversed(list(pairwise(steps))):
        low, high = start // CELL_PADDING, end // CELL_PADDING
        if high > low and fits(max(low, 1) * CELL_PADDING + (CELL_PADDING if start else 0)):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle * CELL_PADDING) else (low, middle)
            best = high if fits(high * CELL_PADDING) else low
            return best * CELL_PADDING
    return 0


def judge_together(
    requests: Sequence[tuple[Calibration, int, int, Rules]],
    available: tuple[int, ...] | None,
    *,
    extrapolate: bool = False,
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
    for index, (calibration, context, num_parallel, rules) in enumerate(requests):
        while True:
            taken = sum(_taken(verdicts[one]) for one in resident)
            rest = None if not available else (max(available[0] - taken, 0), *available[1:])
            verdict = judge(calibration, context, num_parallel, rest, rules, extrapolate=extrapolate)
            if not resident or rest is None or not rules.evicts(calibration, context, num_parallel, sum(rest), len(resident)):
                break
            fates[resident.pop(0)] = "evicted"
        verdicts.append(verdict)
        fates.append({"fits": "resident", "offload": "offload", "unknown": None}[verdict.verdict])
        if verdict.verdict != "unknown":
            resident.append(index)
    return verdicts, fates


def _taken(verdict: Verdict) -> int:
    """Device memory of a model once it runs: all of it, or what the engine's reserve leaves."""
    if verdict.verdict == "fits":
        return verdict.required_bytes or 0
    return max((verdict.available_bytes or 0) - (verdict.reserve_bytes or 0), 0)


def _unknown(
    calibration: Calibration, needed: Prediction, available: tuple[int, ...] | None, reason: str, rules: Rules
) -> Verdict:
    layers = calibration.metadata.model.layers
    return Verdict(
        model=calibration.metadata.model.name,
        verdict="unknown",
        basis=calibration.metadata.machine.target,
        required_bytes=needed.total_bytes if needed.within_range else None,
        reserve_bytes=rules.placement(calibration).reserve_of(needed.overhead_bytes),
        available_bytes=sum(available) if available else None,
        short_bytes=None,
        uncertainty_bytes=needed.uncertainty_bytes if needed.within_range else None,
        margin_bytes=None,
        tight=False,
        max_context=largest_context(calibration, needed.num_parallel, available, rules),
        layers_total=None if layers is None else layers + 1,
        layers_offloaded=None,
        layers_overflowing=None,
        decode_tokens_per_s=None,
        context=needed.context,
        num_parallel=needed.num_parallel,
        reason=reason,
        warnings=needed.warnings,
    )


def _devices(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"
