"""What moved between two calibrations of one model, beyond what measuring them could have moved.

A figure has moved when old and new differ by more than the errors of both together. The errors come from the calibrations
themselves: ``max_error``, the spread of the overhead, the rounding of the log and, for speeds, the spread of repeated timings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from typing import Final, Literal

import msgspec

from harness.fit.observations import allowed_spread
from harness.fit.speed import SAME_DEPTH
from harness.model.calibration import Band, Calibration
from harness.prediction.memory import predict
from harness.prediction.rules import Rules
from harness.prediction.verdict import largest_context
from harness.units import GIB, MIB, TOKENS_PER_UNIT, format_size

#: What a meter itself may move from run to run, bytes: NVML counts the driver's pages of 2 MiB; a heap's break is random.
METER_STEP: Final = {"nvml": 2 * MIB, "drm": 2 * MIB, "host": MIB, "log": 0, "import": 2 * MIB}
#: Least run-to-run spread of a speed, relative: with and without repeated timings in the run, and on the host, where
#: other work of the machine moves it by 9 to 25 %.
SPEED_SPREAD: Final = 0.05
SPEED_SPREAD_UNKNOWN: Final = 0.15
SPEED_SPREAD_HOST: Final = 0.25
#: Memory of common cards, GiB.
CARDS: Final = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
#: Half of the sixth decimal of the artifact.
_DECIMALS: Final = 0.5e-6

Kind = Literal["constant", "part", "band", "speed", "setting", "range"]
Value = float | int | str | None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure on both sides. ``tolerance`` is the measurement error of both together, in the figure's own unit.

    Units follow the name: ``_gb`` GiB, ``_gb_per_10k`` GiB per 10 000 tokens, ``_per_s`` tokens per second. A tolerance of
    ``None`` means that any difference counts.
    """

    name: str
    kind: Kind
    old: Value
    new: Value
    tolerance: float | None = None

    @property
    def moved(self) -> bool:
        """Whether old and new differ by more than the tolerance."""
        if self.tolerance is None or not isinstance(self.old, int | float) or not isinstance(self.new, int | float):
            return self.old != self.new
        return abs(self.new - self.old) > self.tolerance


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A version, digest or machine that differs: what may have moved the figures, and is no drift by itself."""

    name: str
    old: str | None
    new: str | None


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """What a drift means for a user.

    The range that is calibrated (tokens), the largest context on a card of ``card_gb`` (GiB) within the range of both, memory
    at ``context`` (bytes), or decode (tokens per second).
    """

    kind: Literal["range", "largest-context", "memory", "decode"]
    old: float
    new: float
    card_gb: int | None = None
    context: int | None = None


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """Two calibrations compared; ``figures`` are all that both sides know."""

    figures: tuple[Figure, ...]
    changes: tuple[Change, ...]
    effects: tuple[Effect, ...] = ()

    @property
    def moved(self) -> tuple[Figure, ...]:
        """The figures beyond their tolerance."""
        return tuple(figure for figure in self.figures if figure.moved)


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """How far one calibration's figures may be off; bytes, but for ``relative``."""

    relative: float
    overhead: float
    rounding: float
    span: int
    middle: float

    @property
    def slope(self) -> float:
        """GiB per 10 000 tokens that rounding alone can make: both ends of the contexts, in opposite ways."""
        return 2 * self.rounding * TOKENS_PER_UNIT / self.span / GIB if self.span else 0.0

    @property
    def intercept(self) -> float:
        """GiB that rounding alone can move a line at context 0."""
        return self.rounding / GIB + self.slope * self.middle / TOKENS_PER_UNIT


def errors_of(calibration: Calibration, rules: Rules) -> Errors:
    """The measurement error of a calibration, from its own quality section.

    Where the spread of the overhead is not known, it is the largest that a run may have and still be trusted.
    """
    quality, machine = calibration.metadata.quality, calibration.metadata.machine
    top = calibration.metadata.bands[-1].num_batch
    contexts = [load.context for load in quality.loads if load.num_batch == top]
    if len(set(contexts)) < 2:  # its slopes come from another band
        contexts = [load.context for load in quality.loads]
    largest = max((load.total_gb for load in quality.loads), default=0.0) * GIB
    step = METER_STEP.get(machine.meter, 0)
    if machine.meter == "log":
        overhead = 0.0
    elif quality.overhead_spread_gb is None:
        overhead = allowed_spread(largest)
    else:
        overhead = max(quality.overhead_spread_gb * GIB, step)
    return Errors(
        relative=quality.max_error or 0.0,
        overhead=overhead,
        rounding=rules.log_rounding(calibration),
        span=max(contexts, default=0) - min(contexts, default=0),
        middle=sum(contexts) / len(contexts) if contexts else 0.0,
    )


def compare(old: Calibration, new: Calibration, rules: tuple[Rules, Rules]) -> Drift:
    """What both calibrations say of each figure, and what else differs between them; ``rules`` are their engines'."""
    errors = errors_of(old, rules[0]), errors_of(new, rules[1])
    figures = [
        *_constants(old, new, errors),
        *_parts(old, new, errors),
        *_bands(old, new, errors),
        *_range(old, new),
        *_settings(old, new),
        *_speeds(old, new),
    ]
    moved = {figure.name for figure in figures if figure.moved and figure.kind != "setting"}
    effects = tuple(_effects(old, new, moved, rules))
    return Drift(figures=tuple(figures), changes=tuple(_changes(old, new)), effects=effects)


def _effects(old: Calibration, new: Calibration, moved: set[str], rules: tuple[Rules, Rules]) -> Iterator[Effect]:
    before, after = (one.metadata.performance.decode_tokens_per_s for one in (old, new))
    if "decode_tokens_per_s" in moved and before and after:
        yield Effect(kind="decode", old=before, new=after)
    if all("tokens_per_s" in name for name in moved):
        return
    slots = new.metadata.settings.num_parallel
    ranges = old.metadata.quality.valid_to, new.metadata.quality.valid_to
    if ranges[0] != ranges[1]:
        yield Effect(kind="range", old=ranges[0], new=ranges[1])
    if moved == {"valid_to"}:
        return  # other contexts were loaded: what a card holds has not moved
    context = min(ranges)
    first, second = (predict(one, context, slots).total_bytes for one in (old, new))
    if first != second:
        yield Effect(kind="memory", context=context, old=first, new=second)
    for card in CARDS:
        devices = max(len(new.metadata.machine.gpus), 1)
        context_then, context_now = (
            largest_context(one, slots, (card * GIB,) * devices, rule) for one, rule in zip((old, new), rules, strict=True)
        )
        if context_then is None or context_now is None:
            continue
        if ranges[0] != ranges[1]:
            context_then, context_now = min(context_then, context), min(context_now, context)
        if context_then != context_now:
            yield Effect(kind="largest-context", card_gb=card, old=context_then, new=context_now)


def sentences(effects: Sequence[Effect], target: str) -> list[str]:
    """Effects in words; cards whose largest contexts are the same on both sides share one."""
    groups = groupby(effects, lambda effect: (effect.kind, effect.old, effect.new))
    return [sentence(list(group), target) for _, group in groups]


def sentence(alike: Sequence[Effect], target: str) -> str:
    """Effects of one kind and the same figures, in words."""
    first, last = alike[0], alike[-1]
    if first.kind == "decode":
        share = first.new / first.old - 1
        word = "faster" if share > 0 else "slower"
        return f"decode: {first.old:.1f} → {first.new:.1f} tokens/s ({abs(share):.0%} {word})"
    if first.kind == "range":
        return f"calibrated range: to {first.old:,} → {first.new:,} tokens"
    if first.kind == "memory":
        more = first.new - first.old
        sizes = f"{format_size(first.old)} → {format_size(first.new)}"
        return f"memory at {first.context:,} tokens: {sizes} ({'+' if more > 0 else '-'}{format_size(abs(more))})"
    size = f"{first.card_gb} GiB" if first is last else f"{first.card_gb} to {last.card_gb} GiB"
    article = "an" if first.card_gb in (8, 80) else "a"
    card = f"on {article} {size} card" if first is last else f"on cards of {size}"
    where = card if target == "gpu" else f"in {size} of free memory"
    old, new = (f"{one:,}" if one else "none fits" for one in (first.old, first.new))
    return f"largest context {where}: {old} → {new}"


def _line(prefix: str, kind: Kind, pairs: dict[str, tuple[float, float]], errors: tuple[Errors, Errors]) -> Iterator[Figure]:
    """The figures of a band, each with the errors of both sides added."""
    for name, pair in pairs.items():
        sides = zip(errors, pair, strict=True)
        if name == "base_vram_gb":  # max_error has the movement of the overhead in it; weights, caches and compute are rounded
            tolerance = sum(max(error.relative * value, error.overhead / GIB) + 3 * error.intercept for error, value in sides)
        elif name == "fixed_cache_gb":
            tolerance = sum(error.relative * value + error.intercept for error, value in sides)
        else:
            tolerance = sum(error.relative * abs(value) + error.slope for error, value in sides)
        yield Figure(name=f"{prefix}{name}", kind=kind, old=pair[0], new=pair[1], tolerance=tolerance + 2 * _DECIMALS)


def _constants(old: Calibration, new: Calibration, errors: tuple[Errors, Errors]) -> Iterator[Figure]:
    names = ("base_vram_gb", "kv_cache_gb_per_10k", "compute_gb_per_10k")
    yield from _line(
        "", "constant", {name: (getattr(old.constants, name), getattr(new.constants, name)) for name in names}, errors
    )


def _parts(old: Calibration, new: Calibration, errors: tuple[Errors, Errors]) -> Iterator[Figure]:
    """What base is made of. Weights are no line, so they have the log's rounding alone."""
    for name in ("weights", "fixed_cache", "compute", "overhead", "budget"):
        a, b = (getattr(one.metadata.breakdown_gb, name) for one in (old, new))
        if a is None or b is None:
            if a != b:
                yield Figure(name=f"{name}_gb", kind="part", old=a, new=b)
            continue
        tolerance = 2 * _DECIMALS
        for error, value in zip(errors, (a, b), strict=True):
            if name in ("weights", "budget"):
                tolerance += error.rounding / GIB
            elif name == "overhead":
                tolerance += error.overhead / GIB + 3 * error.intercept
            else:
                tolerance += error.relative * abs(value) + error.intercept
        yield Figure(name=f"{name}_gb", kind="part", old=a, new=b, tolerance=tolerance)


def _bands(old: Calibration, new: Calibration, errors: tuple[Errors, Errors]) -> Iterator[Figure]:
    """Bands by physical batch; of several of one batch (below a window memory is another line) the last with the last.

    The last band of all is the constants, unless the other side's is of another batch.
    """
    top = old.metadata.bands[-1].num_batch
    same_top = top == new.metadata.bands[-1].num_batch
    for batch in dict.fromkeys(band.num_batch for one in (old, new) for band in one.metadata.bands):
        alike = [[band for band in one.metadata.bands if band.num_batch == batch][::-1] for one in (old, new)]
        for place, (a, b) in enumerate(zip_longest(*alike)):
            where = f"band {'' if batch is None else batch}{' below' * place}"
            if a is None or b is None:
                yield Figure(name=where, kind="band", old=_up_to(a), new=_up_to(b))
            elif place or batch != top or not same_top:
                names = ("base_vram_gb", "kv_cache_gb_per_10k", "compute_gb_per_10k", "fixed_cache_gb")
                pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
                yield from _line(f"{where}: ", "band", pairs, errors)
                yield Figure(name=f"{where}: up_to", kind="band", old=a.up_to, new=b.up_to)


def _up_to(band: Band | None) -> str | None:
    return None if band is None else f"up to {band.up_to:,}"


def _range(old: Calibration, new: Calibration) -> Iterator[Figure]:
    first, second = old.metadata, new.metadata
    yield Figure(name="valid_to", kind="range", old=first.quality.valid_to, new=second.quality.valid_to)
    if first.placement.reserve_gb is not None and second.placement.reserve_gb is not None:
        yield Figure(
            name="reserve_gb",
            kind="range",
            old=first.placement.reserve_gb,
            new=second.placement.reserve_gb,
            tolerance=2 * _DECIMALS,
        )


def _settings(old: Calibration, new: Calibration) -> Iterator[Figure]:
    first, second = old.metadata.settings, new.metadata.settings
    for name in ("num_parallel", "num_batch", "kv_cache_type", "flash_attention"):
        yield Figure(name=name, kind="setting", old=getattr(first, name), new=getattr(second, name))
    for name in dict.fromkeys((*first.own, *second.own)):
        yield Figure(name=name, kind="setting", old=first.own.get(name), new=second.own.get(name))
    for name in sorted({*first.env, *second.env}):
        yield Figure(name=f"env {name}", kind="setting", old=first.env.get(name), new=second.env.get(name))


def _speeds(old: Calibration, new: Calibration) -> Iterator[Figure]:
    """Speeds that both sides measured. Loading time says more of the page cache than of the engine and is left out."""
    first, second = old.metadata.performance, new.metadata.performance
    spread = speed_spread(old), speed_spread(new)
    yield from _speed("prompt_tokens_per_s", first.prompt_tokens_per_s, second.prompt_tokens_per_s, spread)
    yield from _speed("decode_tokens_per_s", first.decode_tokens_per_s, second.decode_tokens_per_s, spread)
    if "host" not in (old.metadata.machine.target, new.metadata.machine.target):  # there it is the same figure again
        host = (SPEED_SPREAD_HOST, SPEED_SPREAD_HOST)
        yield from _speed("host_decode_tokens_per_s", first.host_decode_tokens_per_s, second.host_decode_tokens_per_s, host)
    for then, now in zip(first.depths[1:], second.depths[1:], strict=False):
        if max(then.depth, now.depth) <= SAME_DEPTH * min(then.depth, now.depth):
            name = f"decode_tokens_per_s at {then.depth} tokens"
            yield from _speed(name, then.decode_tokens_per_s, now.decode_tokens_per_s, spread)


def _speed(name: str, old: float | None, new: float | None, spread: tuple[float, float]) -> Iterator[Figure]:
    if old is not None and new is not None:
        yield Figure(name=name, kind="speed", old=old, new=new, tolerance=round(max(spread[0] * old, spread[1] * new), 2))


def speed_spread(calibration: Calibration) -> float:
    """How far a speed may lie from the same speed in another run, relative."""
    measured = calibration.metadata.performance.spread
    if calibration.metadata.machine.target == "host":
        return (measured or 0.0) + SPEED_SPREAD_HOST
    return SPEED_SPREAD_UNKNOWN if measured is None else max(measured, SPEED_SPREAD)


def _changes(old: Calibration, new: Calibration) -> Iterator[Change]:
    first, second = old.metadata, new.metadata
    pairs = [
        ("id", old.id, new.id),
        ("engine", first.engine.version, second.engine.version),
        ("image", first.engine.image, second.engine.image),
        ("image digest", first.engine.image_digest, second.engine.image_digest),
        ("model", first.model.name, second.model.name),
        ("model digest", first.model.digest, second.model.digest),
        ("quantization", first.model.quantization, second.model.quantization),
        ("GPU", _gpus(old), _gpus(new)),
        ("driver", _drivers(old), _drivers(new)),
        ("target", first.machine.target, second.machine.target),
        ("sandbox", first.machine.sandbox, second.machine.sandbox),
        ("meter", first.machine.meter, second.machine.meter),
    ]
    return (Change(name=name, old=a, new=b) for name, a, b in pairs if a != b)


def _gpus(calibration: Calibration) -> str | None:
    return ", ".join(gpu.name for gpu in calibration.metadata.machine.gpus) or None


def _drivers(calibration: Calibration) -> str | None:
    return ", ".join(sorted({gpu.driver for gpu in calibration.metadata.machine.gpus if gpu.driver})) or None
