"""Will it fit? What the engine will do with a model at a context in the memory that is free, said before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.devices import Arranged, Devices, DeviceVerdict, arrange
from harness.prediction.host import host_bytes, with_growth
from harness.prediction.memory import Prediction, beyond_range, predict
from harness.prediction.one_memory import OneMemory, decode_speed, layers_total
from harness.prediction.rules import Reason, Rules, Sized, Spread
from harness.units import CELL_PADDING

Outcome = Literal["fits", "offload", "unknown"]
#: Where the figures of an answer come from.
Source = Literal["measured", "derived", "estimated", "formula"]
#: By context and batch: what a model takes, and what several devices hold of it.
Kept = dict[tuple[int, int | None], tuple[Prediction, Devices]]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context; bytes, tokens, tokens per second. ``None`` is not known.

    ``fits`` says that ``required_bytes + reserve_bytes <= available_bytes`` at the upper end of the prediction interval, with
    ``uncertainty_bytes`` more. ``margin_bytes`` is what is left at the predicted figure, ``short_bytes`` what is missing
    there (0 where nothing is); ``tight`` says that the interval holds both outcomes, or of what fits that the host could not
    hold the ``host_growth_bytes`` that the engine may come to take there later (prompt cache, checkpoints), at most.
    ``source`` says whether the figures are those of a measured calibration, calculated from one of other settings, or
    estimated without a measurement: by the engine's plan of a load, or by a formula.
    ``max_context`` is the largest context per slot that fits, 0 where none does. ``layers_total`` counts the output layer.
    ``devices`` are those that the engine uses: with several, each has its own margin, the figures above are sums, and
    ``margin_bytes`` is that of the device with the least. ``reasons`` is how the engine came to them.
    ``host_required_bytes`` is what it takes of host memory for certain, ``host_short_bytes`` what is missing there. ``forced``
    are options that place layers: ``fits_by_rule`` then says whether the engine's own rule, which keeps
    ``rule_reserve_bytes`` free, would keep all on the GPU, and what does not fit is ``out_of_memory``, not an offload.
    ``at_most``: ``required_bytes`` is a bound from above.
    """

    model: str
    verdict: Outcome
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
    source: Source
    devices: tuple[DeviceVerdict, ...]
    reasons: tuple[Reason, ...]
    host_required_bytes: int | None
    host_available_bytes: int | None = None
    host_short_bytes: int | None = None
    host_growth_bytes: int | None = None
    forced: str | None = None
    fits_by_rule: bool | None = None
    rule_reserve_bytes: int | None = None
    out_of_memory: bool = False
    at_most: bool = False


def judge(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...] | None,
    rules: Rules,
    *,
    extrapolate: bool = False,
    names: tuple[str, ...] | None = None,
    search: bool = True,
    kept: Kept | None = None,
    env: Mapping[str, str] | None = None,
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
        search: also look for ``max_context``, which takes most of the time.
        kept: filled with what does not depend on ``available``: one dictionary for questions that differ in nothing else.
        env: variables of the server that will run, over those of the calibration: what it may come to take of host memory
            (``host_growth_bytes``) goes by them.

    Raises:
        ValueError: context or slots below one.
    """
    metadata = calibration.metadata
    needed = predict(calibration, context, num_parallel)

    def found() -> Verdict:
        if (reason := beyond_range(calibration, context)) is not None and not extrapolate:
            return unknown(calibration, needed, available, reason, rules)
        if not available:
            return unknown(calibration, needed, None, "the memory that is free is not known", rules)
        if metadata.machine.target == "host" and len(available) > 1:
            reason = f"calibrated in host memory, to be judged on {_devices(len(available))}"
            return unknown(calibration, needed, None, reason, rules)
        try:
            sized = rules.sized(calibration, needed.context, needed.num_parallel, available)
            if sized is not None:
                return _sized(calibration, needed, sized, rules)
            return _Memory(
                calibration, num_parallel, available, named(available, names), rules, search, {} if kept is None else kept
            ).judge(context)
        except UnknownVerdictError as error:
            return unknown(calibration, needed, available, error.message, rules)

    return with_growth(found(), calibration, needed, rules, env)


def named(available: Sequence[int], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of devices that differ from each other."""
    if names is not None and len(set(names)) == len(available):
        return names
    numbered = tuple(f"GPU{index}" for index in range(len(available)))
    return numbered if names is None else tuple(f"{number} ({name})" for number, name in zip(numbered, names, strict=True))


class _Memory(NamedTuple):
    """A calibrated model, and the devices or the host memory that an engine places it on by its layers."""

    calibration: Calibration
    num_parallel: int
    available: tuple[int, ...]
    names: tuple[str, ...]
    rules: Rules
    search: bool
    kept: Kept

    @property
    def on_host(self) -> bool:
        return self.calibration.metadata.machine.target == "host"

    def judge(self, context: int) -> Verdict:
        """Raises UnknownVerdictError where it cannot be said."""
        spread = self.spread(context)
        return self._judge_one(context, spread) if len(spread.cards) == 1 else self._judge_spread(context, spread)

    def spread(self, context: int) -> Spread:
        """The devices that the engine uses. Raises UnknownVerdictError: one of them was not measured by itself."""
        if self.on_host:
            return Spread(cards=(0,))
        spread = self.rules.spread(self.calibration, context, self.num_parallel, self.available, self.names)
        measured_on = len(self.calibration.metadata.machine.gpus)
        if len(spread.cards) == 1 and measured_on > 1:
            raise UnknownVerdictError(f"calibrated on {_devices(measured_on)}, to be judged on one device")
        return spread

    def _arrange(self, context: int, spread: Spread) -> tuple[Prediction, Arranged]:
        free = tuple(self.available[card] for card in spread.cards)
        batch = self.rules.batch(self.calibration, context, self.num_parallel, sum(free))
        if (context, batch) not in self.kept:
            needed = predict(self.calibration, context, self.num_parallel, num_batch=batch)
            self.kept[context, batch] = needed, Devices(self.calibration, needed, self.rules)
        needed, devices = self.kept[context, batch]
        return needed, arrange(devices, spread, free, [self.names[card] for card in spread.cards])

    def _judge_spread(self, context: int, spread: Spread) -> Verdict:
        needed, found = self._arrange(context, spread)
        placed, devices = found.placed, found.devices
        known = all(one.layers is not None for one in devices)
        measured_on = max(len(self.calibration.metadata.machine.gpus), 1)
        return _verdict(
            self.calibration, needed, "fits" if found.fits else "offload", _Figures.of(devices),
            uncertainty=found.uncertainty_bytes,
            tight=found.tight,
            max_context=self.largest() if self.search else None,
            layers=(placed.total, placed.offloaded if known else None, placed.overflowing if known else None),
            decode=decode_speed(self.calibration, placed) if found.fits and measured_on == len(devices) else None,
            warnings=found.notes(self.rules.title, measured_on),
            source="derived" if found.derived else "measured",
            devices=devices,
            reasons=spread.reasons,
            host=host_bytes(self.calibration, needed, None if found.fits else placed) if known else None,
        )  # fmt: skip

    def _judge_one(self, context: int, spread: Spread) -> Verdict:
        card = spread.cards[0]
        free = self.available[card]
        found = OneMemory(self.calibration, context, self.num_parallel, self.rules).at(free)
        one = DeviceVerdict(
            name=self.names[card],
            required_bytes=found.needed.total_bytes,
            reserve_bytes=found.reserve,
            available_bytes=free,
            short_bytes=max(found.needed.total_bytes + found.reserve - free, 0),
            layers=found.layers[0],
        )
        warnings: tuple[str, ...] = ()
        if self.rules.placement(self.calibration).estimates:
            engine = f"{self.rules.title} {self.calibration.metadata.engine.version}"
            warnings = (f"{engine} places layers by its own estimate, which is often above what it then takes",)
        return _verdict(
            self.calibration, found.needed, "offload" if found.spills else "fits", _Figures.of((one,)),
            uncertainty=found.needed.uncertainty_bytes,
            tight=found.tight,
            max_context=self.largest() if self.search else None,
            layers=(found.layers_total, *found.layers),
            decode=found.decode,
            warnings=warnings,
            devices=() if self.on_host else (one,),
            reasons=spread.reasons,
            host=host_bytes(self.calibration, found.needed, found.placed),
        )  # fmt: skip

    def _fits(self, context: int) -> bool:
        spread = self.spread(context)
        if len(spread.cards) > 1:
            return self._arrange(context, spread)[1].fits
        return OneMemory(self.calibration, context, self.num_parallel, self.rules).fits(self.available[spread.cards[0]])

    def largest(self) -> int:
        """The largest context that fits. Raises UnknownVerdictError where it cannot be said."""
        return largest_where(self.calibration, self._fits)


def largest_where(calibration: Calibration, fits: Callable[[int], bool]) -> int:
    """The largest context of the calibrated range, in whole steps of cells, for which ``fits`` holds; 0 where it never does."""
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


def _sized(calibration: Calibration, needed: Prediction, sized: Sized, rules: Rules) -> Verdict:
    """An engine that offloads nothing starts with what it is given, or not at all."""
    short, total = sized.short_bytes > 0, layers_total(calibration)
    return _verdict(
        calibration, needed, "offload" if short else "fits", _Figures.of((sized,)),
        uncertainty=0,
        max_context=sized.max_context,
        layers=(total, None, None) if short else (total, total, 0),
        decode=None if short else decode_speed(calibration, None),
        reason=f"{rules.title} does not start with this: it moves nothing to the CPU" if short else None,
    )  # fmt: skip


def unknown(
    calibration: Calibration, needed: Prediction, available: tuple[int, ...] | None, reason: str, rules: Rules
) -> Verdict:
    """The verdict that nothing can be said, and why."""
    figures = _Figures(
        required=needed.total_bytes if needed.within_range else None,
        reserve=rules.placement(calibration).reserve_of(needed.overhead_bytes),
        available=sum(available) if available else None,
    )
    return _verdict(
        calibration, needed, "unknown", figures,
        uncertainty=needed.uncertainty_bytes if needed.within_range else None,
        max_context=largest_context(calibration, needed.num_parallel, available, rules),
        layers=(layers_total(calibration), None, None),
        reason=reason,
    )  # fmt: skip


class _Figures(NamedTuple):
    """Bytes of a verdict."""

    required: int | None
    reserve: int | None
    available: int | None
    short: int | None = None
    margin: int | None = None

    @classmethod
    def of(cls, memories: Sequence[DeviceVerdict | Sized]) -> _Figures:
        """Sums over them, and the least margin."""
        return cls(
            required=sum(one.required_bytes for one in memories),
            reserve=sum(one.reserve_bytes for one in memories),
            available=sum(one.available_bytes for one in memories),
            short=sum(one.short_bytes for one in memories),
            margin=min(one.available_bytes - one.required_bytes - one.reserve_bytes for one in memories),
        )


def _verdict(
    calibration: Calibration,
    needed: Prediction,
    verdict: Outcome,
    figures: _Figures,
    *,
    uncertainty: int | None,
    max_context: int | None,
    layers: tuple[int | None, int | None, int | None],
    tight: bool = False,
    decode: float | None = None,
    reason: str | None = None,
    warnings: tuple[str, ...] = (),
    source: Source = "measured",
    devices: tuple[DeviceVerdict, ...] = (),
    reasons: tuple[Reason, ...] = (),
    host: int | None = None,
) -> Verdict:
    """The one place where a verdict is made; ``layers`` are in all, offloaded and overflowing."""
    return Verdict(
        model=calibration.metadata.model.name,
        verdict=verdict,
        basis=calibration.metadata.machine.target,
        required_bytes=figures.required,
        reserve_bytes=figures.reserve,
        available_bytes=figures.available,
        short_bytes=figures.short,
        uncertainty_bytes=uncertainty,
        margin_bytes=figures.margin,
        tight=tight,
        max_context=max_context,
        layers_total=layers[0],
        layers_offloaded=layers[1],
        layers_overflowing=layers[2],
        decode_tokens_per_s=decode,
        context=needed.context,
        num_parallel=needed.num_parallel,
        reason=reason,
        warnings=(*needed.warnings, *warnings),
        source=source,
        devices=devices,
        reasons=reasons,
        host_required_bytes=host,
        at_most=needed.at_most,
    )


def largest_context(calibration: Calibration, num_parallel: int, available: tuple[int, ...] | None, rules: Rules) -> int | None:
    """The largest context per slot (whole steps of 256 cells, within the calibrated range) that fits; 0 where none does.

    ``None`` where it cannot be said: nothing was read, or other devices than calibrated. An engine that pages its KV cache has
    steps of its own.

    Raises:
        ValueError: slots below one.
    """
    if num_parallel < 1:
        raise ValueError("slots must be at least 1")
    if not available or (calibration.metadata.machine.target == "host" and len(available) > 1):
        return None
    try:
        sized = rules.sized(calibration, 1, num_parallel, available)
        if sized is not None:
            return sized.max_context
        return _Memory(calibration, num_parallel, available, named(available, None), rules, search=True, kept={}).largest()
    except UnknownVerdictError:
        return None


def _devices(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"
