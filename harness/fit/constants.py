"""From loads to constants: the straight lines of memory over context.

For fixed physical batch, slots, flash attention and KV type, the memory of a model on its target is exactly a straight line in
the context (llama.cpp b10434, measured on six architectures), but for the bends that :mod:`harness.fit.batch_fit` knows. The
slope's two parts come from the log, which is exact to 0.005 MiB; the intercept from the meter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Final

import msgspec

from harness.errors import UntrustedError
from harness.fit.artifact import calibration_of
from harness.fit.batch_fit import (
    BatchFit,
    Segment,
    bends,
    confirms_law,
    curvature,
    fit_batches,
    leave_one_out,
    placement_doubt,
)
from harness.fit.load_plan import slot_limits
from harness.fit.observations import Point, allowed_spread, planned_buffers, points_of
from harness.model.calibration import (
    Band,
    Breakdown,
    Calibration,
    MeasuredLoad,
)
from harness.model.record import Record, Settings
from harness.units import GIB, MIB, TOKENS_PER_UNIT, format_size, gib

#: Largest relative error of a left-out load before a run is refused.
MAX_ERROR: Final = 0.01
#: Architectures whose caches hold latents (MLA). Without flash attention, a copy of the values (1 KiB/token) hides below the
#: batch's activations up to some context, which depends on the batch, and comes on top from there (llama.cpp b10434).
LATENT_ATTENTION: Final = frozenset({"deepseek2"})


def overhead_spread(points: Sequence[Point]) -> float | None:
    """Largest minus smallest overhead of loads that should have the same, bytes; ``None`` where no two can be compared.

    Workspaces of the driver's libraries come with the first real batch and go with its size (an H100: 108, 118 and 138 MiB at
    512, 1,024 and 2,048 for F16 weights), so loads of one batch are compared; before a prompt all loads have the same.
    """
    idle = [point.idle_overhead for point in points if point.idle_overhead is not None]
    if len(idle) == len(points):
        groups = [idle, *_by_batch(points)]
    else:
        groups = [[point.overhead for point in points if point.overhead is not None]]
        if (_spread(groups) or 0.0) > allowed_spread(max(point.total for point in points)) and (rest := _beside_graph(points)):
            groups = [rest]
    return _spread(groups)


def _spread(groups: Sequence[Sequence[float]]) -> float | None:
    return max((max(group) - min(group) for group in groups if len(group) > 1), default=None)


def _beside_graph(points: Sequence[Point]) -> list[float]:
    """Overheads without what goes with the physical batch, where loads of three batches show that; else nothing.

    llama.cpp keeps room for 40 nodes of a graph a token of the batch for models with gated delta nets (qwen3next, qwen35,
    kimi-linear; ``graph_max_nodes`` of src/llama-context.cpp): 863 MiB at 1,024, which ``MALLOC_PERTURB_`` makes resident. What
    of it is known to stay empty is taken off before (:func:`harness.fit.growth.without_room`).
    """
    groups = {batch: group for batch, group in zip(_batches(points), _by_batch(points), strict=True) if group}
    if len(groups) < 3 or all(len(group) == 1 for group in groups.values()):
        return []
    means = {batch: fmean(group) for batch, group in groups.items()}
    low, high = min(means), max(means)
    slope = (means[high] - means[low]) / (high - low)
    if slope < 0:
        return []
    return [point.overhead - slope * (point.num_batch or 0) for point in points if point.overhead is not None]


def _batches(points: Sequence[Point]) -> list[int]:
    return sorted({point.num_batch or 0 for point in points})


def _by_batch(points: Sequence[Point]) -> list[list[float]]:
    """The overheads of each physical batch, in ascending order of the batches."""
    return [
        [point.overhead for point in points if (point.num_batch or 0) == batch and point.overhead is not None]
        for batch in _batches(points)
    ]


def _disorder(points: Sequence[Point]) -> float:
    """How far a batch's workspaces are above those of a larger batch, or below nothing; bytes, 0 where all is well."""
    idle = [point.idle_overhead for point in points if point.idle_overhead is not None]
    if len(idle) < len(points):
        return 0.0
    means = [fmean(idle), *(fmean(group) for group in _by_batch(points) if group)]
    return max((low - high for low, high in pairwise(means)), default=0.0)


def check_overhead(points: Sequence[Point]) -> None:
    """Refuse a run whose meter and log do not differ by one constant for each physical batch.

    Raises:
        UntrustedError: the overhead of the loads is spread wider than ``max(8 MiB, 0.5 % of V)``.
    """
    spread = max(overhead_spread(points) or 0.0, _disorder(points))
    allowed = allowed_spread(max(point.total for point in points))
    if spread > allowed:
        raise UntrustedError(
            f"what the meter saw beyond the log differs between loads by {spread / MIB:.1f} MiB "
            f"(allowed: {allowed / MIB:.1f}): another process changed its memory, or the engine's allocator is not repeatable",
            hint="look for other users of the device, then calibrate again",
            code="overhead-moves",
        )


def _band(fitted: BatchFit, segment: Segment, up_to: int) -> tuple[Band, Breakdown]:
    weights, compute = gib(fitted.weights), gib(segment.compute.start)
    fixed_cache = gib(max(segment.cache.start, 0.0))
    beside, slots = segment.beside, fitted.slots
    growth = fitted.growth + slots * beside.slope
    overhead = None if fitted.overhead is None else gib(fitted.overhead + slots * beside.start)
    base = round(weights + compute + fixed_cache + (overhead or 0.0), 6)
    band = Band(
        up_to=up_to,
        num_batch=fitted.num_batch,
        base_vram_gb=base,
        kv_cache_gb_per_10k=gib(segment.cache.slope * TOKENS_PER_UNIT),
        compute_gb_per_10k=gib((segment.compute.slope + growth) * TOKENS_PER_UNIT),
        fixed_cache_gb=fixed_cache,
        overhead_gb_per_10k=gib(growth * TOKENS_PER_UNIT) or None,
        slot_overhead_gb=gib(beside.start) or None,
        slot_overhead_gb_per_10k=gib(beside.slope * TOKENS_PER_UNIT) or None,
        curve_gb_per_10k2=gib(curvature(fitted) * TOKENS_PER_UNIT**2) or None,
        recurrent_gb=gib(fitted.caches.recurrent) or None,
        compute_doubt_gb=None if segment.doubt is None else gib(segment.doubt),
    )
    return band, Breakdown(weights=weights, fixed_cache=fixed_cache, compute=compute, overhead=overhead)


def band_ends(fits: Sequence[BatchFit], limits: Sequence[tuple[int, int]], reach: int) -> list[int]:
    """The largest context of each batch: by the engine's rule, else by the loads, but for the last batch; cut at ``reach``.

    ``limits`` are pairs (largest context, batch) of the engine's own batch rule, in ascending order.
    """
    known = {batch: limit for limit, batch in limits}
    measured = [max(point.context for point in fitted.points) for fitted in fits[:-1]]
    ends = [known.get(fitted.num_batch or 0, end) for fitted, end in zip(fits, [*measured, reach], strict=True)]
    return [min(end, reach) for end in ends]


def fit_record(record: Record) -> Calibration:
    """The calibration of a record, with its facts read. Pure: the same record gives the same bytes.

    Raises:
        UntrustedError: too few points, settings that differ, an overhead that moves, or an error above 1 %.
    """
    from harness.fit.totals import fit_totals, totals_of

    if totals := totals_of(record):
        return fit_totals(record, totals)
    points, notes = points_of(record)
    if not points:
        raise UntrustedError(
            "no load lay completely on the target, so there is nothing to fit",
            hint="free memory on the device, or calibrate at smaller contexts (--ctx)",
            code="no-points",
        )
    check_overhead(points)
    points, fits = _on_lines(points, record, notes)
    # A batch that was asked for is sent at every context; only the engine's own choice has limits.
    limits = slot_limits(record.batch_limits, points[0].parallel) if record.settings.num_batch is None else ()
    ends = band_ends(fits, limits, _reach(record, fits[-1], notes))
    bands = _bands(fits, ends)
    max_error = _max_error(fits, ends, notes)
    if record.plan_error is not None:
        max_error = max(max_error or 0.0, record.plan_error)
        notes.append(
            f"quick: one load was made; the others were planned, and the plan of the one was off by {record.plan_error:.3%}"
        )
    measured = {fitted.num_batch for fitted in fits}
    notes.extend(
        f"batch {batch} was not measured: up to {limit:,} tokens the constants of the next batch stand, which are larger"
        for limit, batch in limits
        if batch not in measured and limit < ends[-1]
    )
    notes.extend(_doubts(fits))
    breakdown = bands[-1][1]
    placed = [_with_overhead(*one, breakdown, record) for one in bands]
    if record.machine.meter == "host" and any(band.overhead_gb is not None for band in placed):
        notes.append("the overhead goes with the physical batch: room for a graph, counted though no engine fills it")
    return calibration_of(
        record,
        placed,
        breakdown,
        settings=_effective(record.settings, points, fits[-1].num_batch),
        loads=(
            MeasuredLoad(context=point.context, num_batch=point.num_batch, total_gb=gib(point.total), planned=point.planned)
            for point in points
        ),
        max_error=max_error,
        spread=overhead_spread(points),
        notes=notes,
    )


def _on_lines(points: list[Point], record: Record, notes: list[str]) -> tuple[list[Point], list[BatchFit]]:
    """The fits, without a batch's smallest load where that alone is off the line of three others, and below it.

    A context as small as the batch takes less than the line says (f32 caches with flash attention, embedded b11549: 4 MiB of
    175 at 512 tokens), so the line is an upper bound there. A load above the line stays, and refuses the run.
    """
    fit = partial(fit_batches, by_law=record.machine.meter == "import", buffers=planned_buffers(record))
    fits = fit(points)
    if (leave_one_out(fits) or 0.0) <= MAX_ERROR:
        return points, fits
    main = max(fits, key=lambda fitted: len(fitted.points))
    smallest = min(main.points, key=lambda point: point.context)
    others = [point for point in points if point is not smallest]
    again = fit(others) if len(main.points) > 3 else []
    line = next((fitted for fitted in again if fitted.num_batch == main.num_batch), None)
    over = 0.0 if line is None else line.total(smallest.context, smallest.parallel) - smallest.total
    if over <= 0 or (leave_one_out(again) or 0.0) > MAX_ERROR:
        return points, fits
    notes.append(
        f"context {smallest.context:,}: not a point of the fit ({format_size(round(over))} below the line of the others, which "
        "is an upper bound there)"
    )
    return others, again


def _bands(fits: Sequence[BatchFit], ends: Sequence[int]) -> list[tuple[Band, Breakdown]]:
    """The pieces of every batch inside its own stretch of contexts, ascending and without gaps."""
    bands: list[tuple[Band, Breakdown]] = []
    start = 0
    for fitted, end in zip(fits, ends, strict=True):
        for segment in fitted.segments():
            up_to = end if segment.up_to is None else min(segment.up_to, end)
            if up_to > start:
                bands.append(_band(fitted, segment, up_to))
                start = up_to
    return bands


def _with_overhead(band: Band, own: Breakdown, last: Breakdown, record: Record) -> Band:
    """A band with the overhead of its batch, where each batch has one of its own (drivers, graphs); a mebibyte is none."""
    if record.machine.meter not in ("nvml", "host") or own.overhead is None or last.overhead is None:
        return band
    if abs(own.overhead - last.overhead) * GIB <= (MIB if record.machine.meter == "nvml" else allowed_spread(0.0)):
        return band
    return msgspec.structs.replace(band, overhead_gb=own.overhead)


def _reach(record: Record, last: BatchFit, notes: list[str]) -> int:
    """The largest context that the constants hold for: the training context, unless a bend may hide before it."""
    measured = max(point.context for point in last.points)
    reach = record.model.train_context or measured
    if last.caches.window_per_cell and last.window_cells is None:
        why = "no load reached the full size of the sliding window's cache"
    elif last.planned:
        return reach
    elif last.points[0].flash_attention == "disabled" and record.model.architecture in LATENT_ATTENTION:
        why = "without flash attention the compute buffers of latent attention step at a context that depends on the batch"
    elif bends(last) and len(last.compute) == 1:
        why = "the compute buffers bend between the loads"
    elif any(point.pool for point in last.points):
        why = "without flash attention the driver's pool grows with the prompt, and was measured up to there"
    elif not last.extrapolated and not confirms_law(last) and not _is_measured_line(last):
        why = "the compute buffers do not grow by whole rows of masks or scores, so a bend may follow"
    elif (failed := _failed(record, measured)) is not None and failed <= reach:
        why = f"a load at {failed:,} tokens did not fit here"
    else:
        return reach
    if measured < reach:
        notes.append(f"valid to {measured:,}: {why}")
    return min(measured, reach)


def _failed(record: Record, measured: int) -> int | None:
    """The smallest context beyond the ``measured`` ones at which the engine could not allocate; ``None`` where it could."""
    contexts = (load.request.context for load in record.loads if load.outcome == "wont-fit")
    return min((context for context in contexts if context > measured), default=None)


def _is_measured_line(fitted: BatchFit) -> bool:
    """Whether three loads with flash attention lie on one line: nothing steps there but with the context."""
    contexts = {point.context for point in fitted.points if not point.below_window}
    return fitted.points[0].flash_attention == "enabled" and len(contexts) > 2


def _max_error(fits: Sequence[BatchFit], ends: Sequence[int], notes: list[str]) -> float | None:
    error = leave_one_out(fits)
    if error is None:
        notes.append("max_error was not measured: it needs three contexts in one band")
    elif error > MAX_ERROR:
        raise UntrustedError(
            f"a load left out is predicted with an error of {error:.2%}, above {MAX_ERROR:.0%}: memory is not a straight "
            "line over these contexts",
            hint=_other_loads(fits),
            code="not-a-line",
        )
    doubt = placement_doubt(fits, ends)
    if doubt > MAX_ERROR:
        raise UntrustedError(
            f"bands of one load may be off by {doubt:.2%}: compute buffers do not grow by the known law, which places them",
            hint="calibrate one batch at a time, with --num-batch",
            code="law-not-confirmed",
        )
    return error if error is None else max(error, doubt)


def _other_loads(fits: Sequence[BatchFit]) -> str:
    """What to do where memory is no straight line."""
    for fitted in fits:
        computes = [point.compute for point in sorted(fitted.points, key=lambda point: point.context)]
        if any(high - low > MIB for high, low in pairwise(computes)):
            span = f"{format_size(min(computes))} to {format_size(max(computes))}"
            return (
                f"its compute buffers rise and fall with the context ({span}), as in Ollama 0.24: measure a newer version, "
                "or with --flash-attention off"
            )
    if any(fitted.window_cells is not None for fitted in fits):
        return "calibrate with --ctx beyond the sliding window plus the batch"
    return "calibrate with more contexts, or larger ones (--ctx)"


def _doubts(fits: Sequence[BatchFit]) -> list[str]:
    """What a reader should know of how the bands were found."""
    notes: list[str] = []
    extrapolated = ", ".join(str(fitted.num_batch) for fitted in fits if fitted.extrapolated)
    if extrapolated:
        confirmed = "confirmed" if any(confirms_law(fitted) for fitted in fits) else "not confirmed"
        notes.append(f"batch {extrapolated}: placed by one load and the law of compute growth, {confirmed} by the other batch")
    for fitted in fits:
        if fitted.planned:
            end = fitted.planned[-1].end
            notes.append(
                f"batch {fitted.num_batch}: compute buffers up to {end:,} tokens are as the engine plans them; its plans "
                "of the loads are exact"
            )
            continue
        if len(fitted.compute) > 1:
            bend = fitted.segments()[-2].up_to
            notes.append(f"batch {fitted.num_batch}: compute buffers bend at {bend:,} tokens; both lines were measured")
        below = any(point.below_window for point in fitted.points)
        cells = fitted.window_cells
        if cells is not None and not below and fitted.points[0].flash_attention != "enabled":
            notes.append(f"batch {fitted.num_batch}: below {cells:,} tokens (window and batch) no load was made")
    if size := fits[-1].cell_bytes:
        notes.append(f"each cell of a cache takes {size} bytes beside the log, its bookkeeping: counted in compute_gb_per_10k")
    if growth := max(fitted.growth for fitted in fits):
        notes.append(
            f"the meter's totals grow by {growth:.1f} bytes a token more than the log says: a straight line, counted in "
            "compute_gb_per_10k; what part of it other slots take is not known"
        )
    rounded = max(point.uncertainty for fitted in fits for point in fitted.points)
    if rounded:
        notes.append(f"the engine rounds its log: a figure may be off by {rounded / MIB:.2f} MiB")
    return notes


def _effective(settings: Settings, points: Sequence[Point], num_batch: int | None) -> Settings:
    """The settings with what the log says instead of what was asked, where it says it."""
    return msgspec.structs.replace(
        settings,
        num_parallel=points[-1].parallel,
        num_batch=settings.num_batch if num_batch is None else num_batch,
        kv_cache_type=points[-1].kv_cache_type or settings.kv_cache_type,
        flash_attention=points[-1].flash_attention or settings.flash_attention,
    )
