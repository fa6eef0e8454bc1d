"""From loads to constants: the straight lines of memory over context.

For fixed physical batch, slots, flash attention and KV type, the memory of a model on its target is exactly a straight line in
the context (llama.cpp b10434, measured on five architectures). The slope's two parts come from the log, which is exact to
0.005 MiB; the intercept from the meter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

import msgspec

from harness.core.calibration import (
    SCHEMA_VERSION,
    Band,
    Breakdown,
    Calibration,
    Constants,
    MeasuredLoad,
    Metadata,
    Quality,
)
from harness.core.performance import fit_performance, fit_placement
from harness.core.points import Point, points_of
from harness.core.record import Record, Settings
from harness.errors import UntrustedError
from harness.units import MIB, TOKENS_PER_UNIT, gib

#: Largest relative error of a left-out load before a run is refused.
MAX_ERROR: Final = 0.01
#: The overhead of all loads must agree to this, or to 0.5 % of the memory measured, whichever is larger.
OVERHEAD_SPREAD: Final = 8 * MIB
OVERHEAD_SPREAD_SHARE: Final = 0.005
#: Slopes of different batches confirm the law of growth when they agree to this.
LAW_TOLERANCE: Final = 0.02


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """``intercept + slope * context``; bytes, and bytes per token of one slot."""

    intercept: float
    slope: float

    def at(self, context: float) -> float:
        """The value at ``context`` tokens per slot."""
        return self.intercept + self.slope * context


class BandFit(msgspec.Struct, frozen=True, kw_only=True):
    """One band's parts, bytes; ``kv`` and ``compute`` are lines over context for one slot."""

    num_batch: int | None
    weights: float
    kv: Line
    compute: Line
    overhead: float | None
    points: tuple[Point, ...]

    def total(self, context: int, parallel: int = 1) -> float:
        """Memory at ``context`` tokens per slot and ``parallel`` slots."""
        return self.weights + self.compute.at(context) + (self.overhead or 0.0) + parallel * self.kv.at(context)


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares through at least two different contexts."""
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return Line(intercept=mean_y - slope * mean_x, slope=slope)


def fit_band(points: Sequence[Point], reference: BandFit | None = None) -> BandFit:
    """Fit one batch's line; a single load takes its slopes from ``reference``, a fitted band of another batch.

    The KV slope does not depend on the batch. The compute slope is proportional to it: ``2*u`` bytes a token with flash
    attention, ``4*(heads+1)*u`` without (llama.cpp's mask and attention-score buffers).
    """
    contexts = {point.context for point in points}
    overheads = [point.overhead for point in points if point.overhead is not None]
    overhead = fmean(overheads) if len(overheads) == len(points) else None
    weights = fmean(point.weights for point in points)
    if len(contexts) > 1:
        kv = fit_line([(point.context, point.kv_per_slot) for point in points])
        compute = fit_line([(point.context, point.compute) for point in points])
    elif reference is not None:
        ratio = (points[0].num_batch or 1) / (reference.num_batch or 1)
        kv = _through(points, lambda point: point.kv_per_slot, reference.kv.slope)
        compute = _through(points, lambda point: point.compute, reference.compute.slope * ratio)
    else:
        raise UntrustedError(
            "one usable load is not enough: a line needs two contexts",
            hint="calibrate with at least two contexts that fit on the target",
            code="too-few-points",
        )
    return BandFit(
        num_batch=points[0].num_batch,
        weights=weights,
        kv=_clean(kv),
        compute=_clean(compute),
        overhead=overhead,
        points=tuple(points),
    )


def _through(points: Sequence[Point], value: Callable[[Point], float], slope: float) -> Line:
    """The line of a known slope through the mean of the points."""
    return Line(intercept=fmean(value(p) for p in points) - slope * fmean(p.context for p in points), slope=slope)


def _clean(line: Line) -> Line:
    """Drop what the log's rounding (0.005 MiB a figure) alone could have produced."""
    slope = line.slope if abs(line.slope) * TOKENS_PER_UNIT > 0.02 * MIB else 0.0
    intercept = line.intercept if abs(line.intercept) > 0.05 * MIB else 0.0
    return Line(intercept=intercept, slope=slope)


def leave_one_out(points: Sequence[Point], reference: BandFit | None = None) -> float | None:
    """The worst relative error when each load in turn is predicted from the others; ``None`` with fewer than three."""
    if len({point.context for point in points}) < 3:
        return None
    errors: list[float] = []
    for index, left_out in enumerate(points):
        others = [point for position, point in enumerate(points) if position != index]
        if len({point.context for point in others}) < 2:
            continue
        predicted = fit_band(others, reference).total(left_out.context, left_out.parallel)
        errors.append(abs(predicted - left_out.total) / left_out.total)
    return max(errors) if errors else None


def fit_bands(points: Sequence[Point]) -> list[BandFit]:
    """One fit per physical batch, ordered by batch; the batch with the most contexts is the reference of the others."""
    groups: dict[int | None, list[Point]] = {}
    for point in points:
        groups.setdefault(point.num_batch, []).append(point)
    main = max(groups, key=lambda batch: (len({p.context for p in groups[batch]}), batch or 0))
    reference = fit_band(groups[main])
    fits = [reference if batch == main else fit_band(group, reference) for batch, group in groups.items()]
    return sorted(fits, key=lambda fitted: fitted.num_batch or 0)


def overhead_spread(points: Sequence[Point]) -> float | None:
    """Largest minus smallest overhead of the loads, bytes; ``None`` where the meter is the log."""
    overheads = [point.overhead for point in points if point.overhead is not None]
    return max(overheads) - min(overheads) if overheads else None


def check_overhead(points: Sequence[Point]) -> None:
    """Refuse a run whose meter and log do not differ by one constant.

    Raises:
        UntrustedError: the overhead of the loads is spread wider than ``max(8 MiB, 0.5 % of V)``.
    """
    spread = overhead_spread(points)
    if spread is None:
        return
    allowed = max(OVERHEAD_SPREAD, OVERHEAD_SPREAD_SHARE * max(point.total for point in points))
    if spread > allowed:
        raise UntrustedError(
            f"what the meter saw beyond the log differs between loads by {spread / MIB:.1f} MiB "
            f"(allowed: {allowed / MIB:.1f}): something else moved, or the engine's allocator is not repeatable",
            hint="look for other users of the device, then calibrate again",
            code="overhead-moves",
        )


def _band(fitted: BandFit, up_to: int) -> tuple[Band, Breakdown]:
    weights, compute = gib(fitted.weights), gib(fitted.compute.intercept)
    fixed_cache = gib(max(fitted.kv.intercept, 0.0))
    overhead = None if fitted.overhead is None else gib(fitted.overhead)
    base = round(weights + compute + fixed_cache + (overhead or 0.0), 6)
    band = Band(
        up_to=up_to,
        num_batch=fitted.num_batch,
        base_vram_gb=base,
        kv_cache_gb_per_10k=gib(fitted.kv.slope * TOKENS_PER_UNIT),
        compute_gb_per_10k=gib(fitted.compute.slope * TOKENS_PER_UNIT),
        fixed_cache_gb=fixed_cache,
    )
    return band, Breakdown(weights=weights, fixed_cache=fixed_cache, compute=compute, overhead=overhead)


def band_limits(batches: Sequence[int | None], limits: Sequence[tuple[int, int]], valid_to: int) -> list[int]:
    """Where each band ends: the engine's rule for its batch, cut at ``valid_to``; the last band reaches it.

    ``limits`` are pairs (largest context, batch) of the engine's own batch rule, in ascending order.
    """
    known = {batch: limit for limit, batch in limits}
    ends = [min(known.get(batch or 0, valid_to), valid_to) for batch in batches]
    if ends:
        ends[-1] = valid_to
    return ends


def fit_record(record: Record) -> Calibration:
    """The calibration of a record, with its facts read. Pure: the same record gives the same bytes.

    Raises:
        UntrustedError: too few points, an overhead that moves, or an error above 1 %.
    """
    points, notes = points_of(record)
    if not points:
        raise UntrustedError(
            "no load lay completely on the target, so there is nothing to fit",
            hint="free memory on the device, or calibrate at smaller contexts (--ctx)",
            code="no-points",
        )
    check_overhead(points)
    fits = fit_bands(points)
    valid_to = record.model.train_context or max(point.context for point in points)
    ends = band_limits([fitted.num_batch for fitted in fits], record.batch_limits, valid_to)
    bands = [_band(fitted, end) for fitted, end in zip(fits, ends, strict=True)]
    errors = [error for fitted in fits if (error := leave_one_out(fitted.points)) is not None]
    max_error = max(errors) if errors else None
    if max_error is None:
        notes.append("max_error was not measured: it needs three contexts in one band")
    elif max_error > MAX_ERROR:
        raise UntrustedError(
            f"a load left out is predicted with an error of {max_error:.2%}, above {MAX_ERROR:.0%}: memory is not a straight "
            "line over these contexts",
            hint="calibrate with --ctx beyond the sliding window plus the batch, or with more contexts",
            code="not-a-line",
        )
    spread = overhead_spread(points)
    performance, speed_notes = fit_performance(record)
    band, breakdown = bands[-1]
    settings = record.settings
    if len(fits) == 1 and settings.num_batch is None:
        settings = msgspec.structs.replace(settings, num_batch=fits[0].num_batch)
    elif len(fits) > 1:
        settings = msgspec.structs.replace(settings, num_batch=fits[-1].num_batch)
    return Calibration(
        id=record.id,
        engine=record.engine_name,
        constants=Constants(
            base_vram_gb=band.base_vram_gb,
            kv_cache_gb_per_10k=band.kv_cache_gb_per_10k,
            compute_gb_per_10k=band.compute_gb_per_10k,
        ),
        metadata=Metadata(
            schema_version=SCHEMA_VERSION,
            calibrated_at=record.started_at,
            model=record.model,
            engine=record.engine,
            settings=_effective(settings, points),
            machine=record.machine,
            breakdown_gb=breakdown,
            bands=tuple(band for band, _ in bands),
            quality=Quality(
                loads=tuple(
                    MeasuredLoad(context=point.context, num_batch=point.num_batch, total_gb=gib(point.total))
                    for point in points
                ),
                max_error=None if max_error is None else round(max_error, 6),
                overhead_spread_gb=None if spread is None else gib(spread),
                valid_to=valid_to,
                notes=tuple(notes + list(record.notes) + speed_notes),
            ),
            placement=fit_placement(record),
            performance=performance,
            run=record.run,
        ),
    )


def _effective(settings: Settings, points: Sequence[Point]) -> Settings:
    """The settings with what the log says instead of what was asked, where it says it."""
    return msgspec.structs.replace(
        settings,
        kv_cache_type=points[-1].kv_cache_type or settings.kv_cache_type,
        flash_attention=points[-1].flash_attention or settings.flash_attention,
    )
