"""Will it fit? What the engine will do with a model at a context in the memory that is free, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.devices import Arranged, DeviceVerdict, arrange
from harness.prediction.memory import Prediction, predict
from harness.prediction.placement import Placed, place
from harness.prediction.rules import Reason, Rules, Sized, Spread
from harness.units import CELL_PADDING, format_size

#: Where the figures of an answer come from.
Source = Literal["measured", "derived"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context; bytes, tokens, tokens per second. ``None`` is not known.

    ``fits`` says that ``required_bytes + reserve_bytes <= available_bytes`` at the upper end of the prediction interval, with
    ``uncertainty_bytes`` more. ``margin_bytes`` is what is left at the predicted figure, ``short_bytes`` what is missing
    there (0 where nothing is); ``tight`` says that the interval holds both outcomes. ``source`` says whether the
    figures are those of a measured calibration or calculated from one of other settings.
    ``max_context`` is the largest context per slot that fits, 0 where none does. ``layers_total`` counts the output layer.
    ``devices`` are those that the engine uses: with several, each has its own margin, the figures above are sums, and
    ``margin_bytes`` is that of the device with the least. ``reasons`` is how the engine came to them.
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
    devices: tuple[DeviceVerdict, ...] = ()
    reasons: tuple[Reason, ...] = ()


def judge(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...] | None,
    rules: Rules,
    *,
    extrapolate: bool = False,
    names: tuple[str, ...] | None = None,
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
        names: of the devices; numbered by default.

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
    if metadata.machine.target == "host":
        if len(available) > 1:
            reason = f"calibrated in host memory, to be judged on {_devices(len(available))}"
            return _unknown(calibration, needed, None, reason, rules)
        return _judge(calibration, context, num_parallel, available[0], rules)
    try:
        return _judge_cards(calibration, context, num_parallel, available, named(available, names), rules)
    except UnknownVerdictError as error:
        return _unknown(calibration, needed, available, error.message, rules)


def named(available: Sequence[int], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of devices that differ from each other."""
    if names is not None and len(set(names)) == len(available):
        return names
    numbered = tuple(f"GPU{index}" for index in range(len(available)))
    return numbered if names is None else tuple(f"{number} ({name})" for number, name in zip(numbered, names, strict=True))


def _judge_cards(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...],
    names: tuple[str, ...],
    rules: Rules,
) -> Verdict:
    """On those of the cards that the engine uses.

    Raises:
        UnknownVerdictError: it cannot be said.
    """
    spread = rules.spread(calibration, context, num_parallel, available, names)
    if len(spread.cards) > 1:
        return _judge_spread(calibration, context, num_parallel, available, names, spread, rules)
    _check_one(calibration)
    card = spread.cards[0]
    verdict = _judge(calibration, context, num_parallel, available[card], rules)
    one = DeviceVerdict(
        name=names[card],
        required_bytes=verdict.required_bytes or 0,
        reserve_bytes=verdict.reserve_bytes or 0,
        available_bytes=available[card],
        short_bytes=verdict.short_bytes or 0,
        layers=verdict.layers_offloaded,
    )
    most = _largest(calibration, num_parallel, available, rules) if len(available) > 1 else verdict.max_context
    return msgspec.structs.replace(verdict, devices=(one,), reasons=spread.reasons, max_context=most)


def _check_one(calibration: Calibration) -> None:
    """Raise where one device was not measured by itself."""
    measured_on = len(calibration.metadata.machine.gpus)
    if measured_on > 1:
        raise UnknownVerdictError(f"calibrated on {_devices(measured_on)}, to be judged on one device")


def _arrange(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...],
    names: tuple[str, ...],
    spread: Spread,
    rules: Rules,
) -> tuple[Prediction, Arranged]:
    free = tuple(available[card] for card in spread.cards)
    batch = rules.batch(calibration, context, num_parallel, sum(free))
    needed = predict(calibration, context, num_parallel, num_batch=batch)
    return needed, arrange(calibration, needed, spread, free, [names[card] for card in spread.cards], rules)


def _judge_spread(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...],
    names: tuple[str, ...],
    spread: Spread,
    rules: Rules,
) -> Verdict:
    needed, found = _arrange(calibration, context, num_parallel, available, names, spread, rules)
    placed, devices = found.placed, found.devices
    known = all(one.layers is not None for one in devices)
    measured_on = max(len(calibration.metadata.machine.gpus), 1)
    bound = f"compute buffers of {_devices(len(devices))} are calculated from {_devices(measured_on)}"
    return Verdict(
        model=calibration.metadata.model.name,
        verdict="fits" if found.fits else "offload",
        basis=calibration.metadata.machine.target,
        required_bytes=sum(one.required_bytes for one in devices),
        reserve_bytes=sum(one.reserve_bytes for one in devices),
        available_bytes=sum(one.available_bytes for one in devices),
        short_bytes=sum(one.short_bytes for one in devices),
        uncertainty_bytes=found.uncertainty_bytes,
        margin_bytes=found.margin_bytes,
        tight=found.tight,
        max_context=_largest(calibration, num_parallel, available, rules),
        layers_total=placed.total,
        layers_offloaded=placed.offloaded if known else None,
        layers_overflowing=placed.overflowing if known else None,
        decode_tokens_per_s=_decode(calibration, placed) if found.fits and measured_on == len(devices) else None,
        context=context,
        num_parallel=num_parallel,
        reason=None,
        warnings=(*needed.warnings, f"derived: {bound}, good to {format_size(found.uncertainty_bytes)} a device"),
        source="derived",
        devices=devices,
        reasons=spread.reasons,
    )


def _judge(calibration: Calibration, context: int, num_parallel: int, free: int, rules: Rules) -> Verdict:
    """On one device, or in host memory."""
    rule = rules.placement(calibration)
    batch = rules.batch(calibration, context, num_parallel, free)
    needed = predict(calibration, context, num_parallel, num_batch=batch)
    reserve = rule.reserve_of(needed.overhead_bytes)
    margin = free - needed.total_bytes - reserve
    doubt = needed.uncertainty_bytes
    spills = margin < doubt
    warnings = list(needed.warnings)
    if rule.estimates:
        version = calibration.metadata.engine.version
        warnings.append(f"{rules.title} {version} places layers by its own estimate, which is often above what it then takes")
    placed: Placed | None = None
    if spills and calibration.metadata.machine.target == "gpu":
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
        max_context=_largest(calibration, num_parallel, (free,), rules),
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
    if not available:
        return None
    try:
        sized = rules.sized(calibration, 1, num_parallel, available)
        if sized is not None:
            return sized.max_context
        return _largest(calibration, num_parallel, available, rules)
    except UnknownVerdictError:
        return None


def _largest(calibration: Calibration, num_parallel: int, available: tuple[int, ...], rules: Rules) -> int:
    """Raises UnknownVerdictError where it cannot be said."""
    rule = rules.placement(calibration)
    host = calibration.metadata.machine.target == "host"
    if host and len(available) > 1:
        raise UnknownVerdictError("host memory is one")
    names = named(available, None)

    def fits(context: int) -> bool:
        cards: tuple[int, ...] = (0,)
        if not host:
            spread = rules.spread(calibration, context, num_parallel, available, names)
            cards = spread.cards
            if len(cards) > 1:
                return _arrange(calibration, context, num_parallel, available, names, spread, rules)[1].fits
            _check_one(calibration)
        free = available[cards[0]]
        batch = rules.batch(calibration, context, num_parallel, free)
        needed = predict(calibration, context, num_parallel, num_batch=batch)
        return needed.total_bytes + needed.uncertainty_bytes + rule.reserve_of(needed.overhead_bytes) <= free

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
