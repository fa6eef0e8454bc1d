"""The straight lines of one physical batch: caches, compute buffers, and where the lines bend.

What grows with the context was measured on llama.cpp b10434 (``make bench-accuracy`` repeats it):

* keys and values of full attention: a constant number of bytes per cell, whatever the batch;
* a sliding window's cache: bytes per cell up to ``pad(window + batch)`` cells, then constant;
* recurrent state: constant;
* compute buffers: ``2*u`` bytes a token and mask with flash attention, ``4*u`` without (the mask, F16 or F32), and without
  flash attention ``4*heads*u`` more (the scores). A sliding window has a mask of its own, as long as its cache. Where they are
  known to leave that line, an engine's plans of them are what counts (:mod:`harness.fit.knots`).

So every line is exact while the batch, the slots, flash attention and the type of the cache stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Final

import msgspec

from harness.errors import UntrustedError
from harness.fit.growth import with_growth
from harness.fit.knots import Knot, Piece, pieces
from harness.fit.lines import ROUNDING, Line, fit_line
from harness.fit.observations import Point
from harness.units import CELL_PADDING, MIB, TOKENS_PER_UNIT

#: Compute buffers further than this from their line, or than this share of all memory, bend.
BEND: Final = 0.1 * MIB
BEND_SHARE: Final = 1e-4
#: A slope confirms the law of growth if it is this close to a whole number of masks.
LAW_TOLERANCE: Final = 0.02
#: A bend needs two loads on each side.
_BEND_POINTS: Final = 4


class Caches(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one slot: what grows, what a cell of the window takes, and the recurrent state."""

    growing: Line
    window_per_cell: float
    recurrent: float


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of contexts, up to ``up_to`` (``None``: no end known), where everything is one line; bytes of one slot.

    ``beside`` is the engine's bookkeeping of the cells, on the host beside its log. ``doubt`` is how far compute that an engine
    has planned may be off its line, bytes.
    """

    up_to: int | None
    cache: Line
    compute: Line
    beside: Line
    doubt: float | None = None


class BatchFit(msgspec.Struct, frozen=True, kw_only=True):
    """All memory of one physical batch. ``compute`` lines are without the window's mask; the largest of them holds.

    ``window_cells`` is the full size of the window cache, ``None`` without one or where no load reached it.
    ``compute_below`` is what compute takes more where the window is not full. ``placed`` means that the slope came from
    another batch, by the law of growth. ``growth`` is what the overhead grows by, bytes per token; ``cell_bytes`` what the
    bookkeeping takes for a cell of one of the ``growing_caches``, or of the window's, of each of ``slots``. ``planned`` is all
    of compute as an engine has planned it, in place of what was fitted.
    """

    num_batch: int | None
    weights: float
    overhead: float | None
    caches: Caches
    window_cells: int | None
    compute: tuple[Line, ...]
    compute_below: float
    mask: float
    extrapolated: bool
    points: tuple[Point, ...]
    growth: float = 0.0
    cell_bytes: int = 0
    growing_caches: float = 1.0
    slots: int = 1
    planned: tuple[Piece, ...] = ()

    def total(self, context: int, parallel: int = 1) -> float:
        """Memory at ``context`` tokens per slot and ``parallel`` slots."""
        segment = next(one for one in self.segments() if one.up_to is None or context <= one.up_to)
        beyond_log = (self.overhead or 0.0) + self.growth * context
        of_slots = parallel * (segment.cache.at(context) + segment.beside.at(context))
        return self.weights + beyond_log + of_slots + segment.compute.at(context)

    def segments(self) -> tuple[Segment, ...]:
        """The lines, ascending; the last one has no end."""
        cells, grows = self.window_cells, bool(self.caches.window_per_cell)
        found: list[Segment] = []
        if self.planned:
            ends = {piece.end for piece in self.planned} | {cells or self.planned[0].end}
            for end in sorted(end for end in ends if end <= self.planned[-1].end):
                piece = next(piece for piece in self.planned if end <= piece.end)
                found.append(self._segment(end, piece.line, filling=grows and end <= (cells or end), doubt=piece.doubt))
            return (*found[:-1], msgspec.structs.replace(found[-1], up_to=None))
        if grows:
            lowest = self.compute[0]
            compute = Line(start=lowest.start + self.compute_below, slope=lowest.slope + self.mask)
            found.append(self._segment(cells, compute, filling=True))
        if cells is not None or not grows:
            for index, line in enumerate(self.compute):
                following = self.compute[index + 1] if index + 1 < len(self.compute) else None
                compute = Line(start=line.start + self.mask * (cells or 0), slope=line.slope)
                found.append(self._segment(None if following is None else _crossing(line, following), compute))
        return tuple(found)

    def _segment(self, up_to: int | None, compute: Line, *, filling: bool = False, doubt: float | None = None) -> Segment:
        """``filling``: the window's cache still grows with the context."""
        caches, cells = self.caches, 0 if filling else self.window_cells or 0
        return Segment(
            up_to=up_to,
            cache=Line(
                start=caches.growing.start + caches.recurrent + caches.window_per_cell * cells,
                slope=caches.growing.slope + (caches.window_per_cell if filling else 0.0),
            ),
            compute=compute,
            beside=Line(start=float(self.cell_bytes * cells), slope=self.cell_bytes * (self.growing_caches + filling)),
            doubt=doubt,
        )


def _crossing(low: Line, high: Line) -> int:
    """The context from which ``high`` holds, in whole steps of cells."""
    return int((low.start - high.start) / (high.slope - low.slope)) // CELL_PADDING * CELL_PADDING


def fit_batches(
    points: Sequence[Point], *, by_law: bool = False, buffers: Mapping[int | None, Sequence[Knot]] | None = None
) -> list[BatchFit]:
    """One fit per physical batch, ascending; the batch with the most contexts is the reference of the others.

    ``buffers`` is what an engine has planned of compute buffers, by batch. ``by_law`` lets a single load with flash attention
    stand: its compute grows by one mask a token, as on every model measured.

    Raises:
        UntrustedError: no batch was loaded at two contexts.
    """
    groups: dict[int | None, list[Point]] = {}
    for point in points:
        groups.setdefault(point.num_batch, []).append(point)
    caches = fit_caches(points)
    main = max(groups, key=lambda batch: (len({p.context for p in groups[batch]}), batch or 0))
    reference = _fit_batch(groups[main], caches, None, by_law=by_law)
    fits = [reference if batch == main else _fit_batch(group, caches, reference) for batch, group in groups.items()]
    loaded = [fitted for fitted in fits if any(point.below_window for point in fitted.points)]
    fits = [_with_step(fitted, loaded[0]) if loaded and fitted not in loaded else fitted for fitted in fits]
    fits = [_with_plans(fitted, (buffers or {}).get(fitted.num_batch, ())) for fitted in fits]
    return sorted(fits, key=lambda fitted: fitted.num_batch or 0)


def _with_plans(fitted: BatchFit, plans: Sequence[Knot]) -> BatchFit:
    """A batch with its compute as planned, and as the loads had it; not where a line would begin below nothing."""
    made = {point.context: point.compute for point in fitted.points}
    planned = pieces(list((dict(plans) | made).items())) if plans else ()
    steep = any(fitted.weights + (fitted.overhead or 0.0) + piece.line.start < 0 for piece in planned)
    return fitted if steep else msgspec.structs.replace(fitted, planned=planned)


def _with_step(fitted: BatchFit, loaded: BatchFit) -> BatchFit:
    """The step of compute below the window, from a batch that was loaded there: without masks, starts go with the batch."""
    scale = (fitted.num_batch or 1) / (loaded.num_batch or 1)
    step = scale * (loaded.compute[0].start + loaded.compute_below) - fitted.compute[0].start
    return msgspec.structs.replace(fitted, compute_below=step if abs(step) > 2 * scale * ROUNDING else 0.0)


def fit_caches(points: Sequence[Point]) -> Caches:
    """Caches per slot, from the log alone; they do not depend on the batch, but for the window's full size."""
    windows = [point for point in points if point.window_cells]
    cells = sum(point.window_cells or 0 for point in windows)
    return Caches(
        growing=_growing(
            [(float(point.context), point.kv_per_slot) for point in points],
            ROUNDING + max(point.uncertainty for point in points),
        ),
        window_per_cell=sum(point.window for point in windows) / cells if cells else 0.0,
        recurrent=fmean(point.recurrent for point in points),
    )


def _growing(values: Sequence[tuple[float, float]], rounding: float) -> Line:
    """A line through the origin where rounding allows it: cells times bytes."""
    slope = sum(x * y for x, y in values) / sum(x * x for x, _ in values)
    if all(abs(y - slope * x) <= rounding for x, y in values) or len({x for x, _ in values}) == 1:
        return Line(start=0.0, slope=slope if slope * TOKENS_PER_UNIT > ROUNDING else 0.0)
    return fit_line(values)


def mask_bytes(point: Point) -> float:
    """Bytes of one attention mask per token: two a row with flash attention, four without; 0 where the log does not say."""
    width = {"enabled": 2, "disabled": 4}.get(point.flash_attention or "", 0)
    return float(width * (point.num_batch or 0))


def _fit_batch(points: Sequence[Point], caches: Caches, reference: BatchFit | None, *, by_law: bool = False) -> BatchFit:
    above = [point for point in points if not point.below_window]
    below = [point for point in points if point.below_window]
    cells = max((point.window_cells or 0 for point in above), default=0) or None
    if cells is None and below and reference is not None and reference.window_cells is not None:
        # The window is padded, and batches are whole steps of the padding: the caches differ by the batches.
        cells = reference.window_cells + (points[0].num_batch or 0) - (reference.num_batch or 0)
    mask = mask_bytes(points[0]) if caches.window_per_cell else 0.0

    def value(point: Point) -> tuple[float, float]:
        return float(point.context), point.compute - mask * min(point.context, cells or point.context)

    full, filling = [value(point) for point in above], [value(point) for point in below]
    extrapolated = False
    if _contexts(full) > 1:
        lines = _compute_lines(full, max(point.total for point in points))
    else:
        if reference is not None:
            extrapolated = True
            slope = reference.compute[-1].slope * (points[0].num_batch or 1) / (reference.num_batch or 1)
        elif (known := filling if _contexts(filling) > 1 else [*full, *filling]) and _contexts(known) > 1:
            slope = fit_line(known).slope
        elif by_law and points[0].flash_attention == "enabled":
            slope = mask_bytes(points[0])
        else:
            raise UntrustedError(
                "one usable load is not enough: a line needs two contexts",
                hint="calibrate, or import loads, at two contexts or more that fit on the target",
                code="too-few-points",
            )
        lines = (_through(full or filling, slope),)
    step = fmean(y - lines[0].at(x) for x, y in filling) if filling and full else 0.0
    overheads = [point.overhead for point in points if point.overhead is not None]
    return BatchFit(
        num_batch=points[0].num_batch,
        weights=fmean(point.weights for point in points),
        overhead=fmean(overheads) if len(overheads) == len(points) else None,
        caches=caches,
        window_cells=cells,
        compute=lines,
        compute_below=step if abs(step) > ROUNDING else 0.0,
        mask=mask,
        extrapolated=extrapolated,
        points=tuple(points),
        growth=points[0].growth,
        cell_bytes=points[0].cell_bytes,
        growing_caches=fmean((point.cells - (point.window_cells or 0)) / point.context for point in points),
        slots=points[0].parallel,
    )


def _contexts(values: Sequence[tuple[float, float]]) -> int:
    return len({x for x, _ in values})


def _through(values: Sequence[tuple[float, float]], slope: float) -> Line:
    """The line of a known slope through the mean of the values."""
    return Line(start=fmean(y for _, y in values) - slope * fmean(x for x, _ in values), slope=slope)


def _compute_lines(values: Sequence[tuple[float, float]], total: float) -> tuple[Line, ...]:
    """One line, or two that meet where the loads show a bend: another operation is the largest from there on."""
    ordered = sorted(values)
    whole = fit_line(ordered)
    allowed = max(BEND, BEND_SHARE * total)
    if _straight(whole, ordered, allowed) or len({x for x, _ in ordered}) < _BEND_POINTS:
        return (whole,)
    for split in range(2, len(ordered) - 1):
        left, right = ordered[:split], ordered[split:]
        if left[0][0] == left[-1][0] or right[0][0] == right[-1][0]:
            continue
        low, high = fit_line(left), fit_line(right)
        straight = _straight(low, left, allowed) and _straight(high, right, allowed)
        if straight and high.slope > low.slope and left[-1][0] < _crossing(low, high) < right[0][0]:
            return (low, high)
    return (whole,)


def _straight(line: Line, values: Sequence[tuple[float, float]], allowed: float) -> bool:
    return all(abs(y - line.at(x)) <= allowed for x, y in values)


def bends(fitted: BatchFit) -> bool:
    """Whether the compute buffers of a batch lie on no straight line, and no engine has planned where they do."""
    if fitted.planned:
        return False
    values = [(float(p.context), p.compute) for p in fitted.points if not p.below_window]
    if len({x for x, _ in values}) < 3 or len(fitted.compute) > 1:
        return len(fitted.compute) > 1
    return not _straight(fit_line(values), values, max(BEND, BEND_SHARE * max(p.total for p in fitted.points)))


def curvature(fitted: BatchFit) -> float:
    """Bytes per token squared by which compute buffers are off the line through the first load and the last; 0 on a line.

    Two loads are always on a line: of a bend, the upper line is one with a third load. What is off by rounding is on it.
    """
    known = sorted((float(p.context), p.compute) for p in fitted.points if not p.below_window)
    upper = [one for one in known if len(fitted.compute) > 1 and one[0] >= _crossing(*fitted.compute[-2:])]
    values = upper if len({x for x, _ in upper}) > 2 else known
    if len({x for x, _ in values}) < 3 or fitted.planned:
        return 0.0
    (x1, y1), *inner, (x3, y3) = values
    slope = (y3 - y1) / (x3 - x1)
    off = [(max(abs(y - y1 - slope * (x - x1)) - ROUNDING, 0.0), (x - x1) * (x3 - x)) for x, y in inner]
    return max((size / product for size, product in off if product), default=0.0)


def is_steep(fitted: BatchFit) -> bool:
    """Whether compute grows by more than one row of masks with flash attention: below the loads it may be another line.

    Ollama 0.24's llama.cpp packs the buffers anew for each context below about 32,768 tokens (qwen2 0.5B: 66 to 103 MiB, up and
    down), and grows by three rows a token from there on.
    """
    row = mask_bytes(fitted.points[0])
    steep = bool(row) and fitted.compute[-1].slope / row >= 1 + LAW_TOLERANCE
    return steep and fitted.points[0].flash_attention == "enabled" and not fitted.extrapolated


def confirms_law(fitted: BatchFit) -> bool:
    """Whether the growth of compute is a whole number of rows: of masks with flash attention, of scores and mask without.

    Then it is proportional to the batch, and one load places the line of another batch.
    """
    row = mask_bytes(fitted.points[0])
    if not row or fitted.extrapolated:
        return False
    rows = fitted.compute[-1].slope / row
    return round(rows) >= 1 and abs(rows - round(rows)) <= LAW_TOLERANCE


def leave_one_out(fits: Sequence[BatchFit]) -> float | None:
    """The worst relative error when each load of a batch in turn is predicted from the others; ``None`` below three contexts.

    A load that alone determines a piece (next to a bend, or the only one below the window) is not counted.
    """
    errors: list[float] = []
    for fitted in fits:
        if len({point.context for point in fitted.points}) < 3:
            continue
        for left_out in fitted.points:
            others = [point for point in fitted.points if point is not left_out]
            if fitted.growth:
                others = with_growth([_whole(point) for point in others], 0.0, sure=True)
            again = msgspec.structs.replace(_fit_batch(others, fit_caches(others), None), planned=fitted.planned)
            if _shape(again) == _shape(fitted):
                predicted = again.total(left_out.context, left_out.parallel)
                errors.append(abs(predicted - left_out.total) / left_out.total)
    return max(errors) if errors else None


def _whole(point: Point) -> Point:
    """A point with all of its overhead."""
    beyond_log = None if point.overhead is None else point.overhead + point.growth * point.context
    return msgspec.structs.replace(point, overhead=beyond_log, growth=0.0)


def _shape(fitted: BatchFit) -> tuple[int, int | None, bool]:
    if fitted.planned:
        return 1, fitted.window_cells, False
    return len(fitted.compute), fitted.window_cells, fitted.compute_below != 0.0


def placement_doubt(fits: Sequence[BatchFit], ends: Sequence[int]) -> float:
    """How far batches placed by one load may be off, relative, where no other batch confirms the law of growth.

    The doubt is the whole growth between the load and the far end of its band.
    """
    if any(confirms_law(fitted) for fitted in fits):
        return 0.0
    worst = 0.0
    for (start, end), fitted in zip(pairwise((0, *ends)), fits, strict=True):
        if fitted.extrapolated:
            contexts = [point.context for point in fitted.points]
            reach = max(max(contexts) - start, end - min(contexts))
            worst = max(worst, abs(fitted.compute[-1].slope) * reach / min(point.total for point in fitted.points))
    return worst
