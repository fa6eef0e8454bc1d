"""What grows with the context and only the meter sees: the driver's pools, and a rising overhead."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Final

import msgspec

from harness.text import at_least
from harness.units import MIB

if TYPE_CHECKING:
    from harness.fit.observations import Point
    from harness.model.record import Record

#: What the meter sees beyond the log is a line if no load is further from it than this share of its rise.
_STRAIGHT: Final = 0.1
#: Bytes of one cell of a cache that no log names: position, shift and 256 bits of sequences, a position in a picture from
#: llama.cpp b6700 or so on, and a token after b10488 (``src/llama-kv-cells.h`` of Ollama 0.12.11, Ollama 0.24 and b11434;
#: measured: 48 with Ollama 0.32, 52 with Ollama 0.33 and the embedded b11549). They are on the host wherever the cache is.
CELL_BYTES: Final = (40, 48, 52)
#: Models with gated delta nets: llama.cpp keeps room for 40 nodes of a graph a token of the batch (``graph_max_nodes``,
#: src/llama-context.cpp), and for each of them for the inputs of a split, 30 tensors of 336 bytes, twice
#: (``ggml_backend_sched_new``, ggml/src/ggml-backend.cpp; b11434). On the host a graph is one split, so nothing fills that
#: room: ``MALLOC_PERTURB_`` makes it resident. Measured, b11549, qwen3next of 12 layers after a prompt of the whole context:
#: 416 MiB less without that variable at u = 512, and 832 at 1,024, of which this is 394 and 788.
_GATED: Final = frozenset({"qwen3next", "qwen35", "qwen35moe", "kimi-linear"})
_ROOM: Final = 40 * 30 * 2 * 336
#: The oldest build, and Ollama, of which that was seen, and cells of the newest size.
_RECENT: Final = (11434, (0, 33, 0))
#: How far overheads of loads on a busy machine lie apart for other reasons (embedded b11549: 12 KiB to 0.17 MiB).
_HEAP_MOVES: Final = MIB / 4
#: The nodes themselves, which are filled, take a tenth of the room more, and a process 20 MiB.
_LEAST_BESIDE: Final = (1.08, 20 * MIB)


def without_room(points: Sequence[Point], record: Record, notes: list[str]) -> list[Point]:
    """Points without what is reserved for a graph and never filled; as they are where their overhead cannot hold it."""
    known = record.model.architecture in _GATED and _is_recent(record.engine.version or "")
    times, least = _LEAST_BESIDE
    rooms = [float(_ROOM * (point.num_batch or 0)) for point in points]
    if not known or any((point.overhead or 0.0) < times * room + least for point, room in zip(points, rooms, strict=True)):
        return list(points)
    listed = " and ".join(f"{room / MIB:,.0f} MiB" for room in sorted(set(rooms)))
    notes.append(f"{listed} of host memory, reserved for a graph by the batch, are not counted: no engine fills them")
    return [
        msgspec.structs.replace(point, total=point.total - room, overhead=(point.overhead or 0.0) - room)
        for point, room in zip(points, rooms, strict=True)
    ]


def _is_recent(version: str) -> bool:
    build, (first, ollama) = version.removeprefix("b"), _RECENT
    return int(build) >= first if build.isdecimal() else at_least(version, ollama)


def with_bookkeeping(points: Sequence[Point], version: str = "") -> list[Point]:
    """Points of a host meter whose overhead is without the engine's bookkeeping of its cells.

    The size of a cell is the known one with which the overheads of a batch differ least; without one of them that is better
    than none, it is none. It is the newest where no two loads tell, but the log names cells, and of a recent engine unless
    another differs by far less: the heap of a busy machine moves by more than 12 bytes a cell of a few thousand.
    """
    groups: dict[int | None, list[Point]] = {}
    if not all(point.cells for point in points):
        return list(points)
    for point in points:
        if point.overhead is not None and not point.planned:
            groups.setdefault(point.num_batch, []).append(point)
    differing = [group for group in groups.values() if len({point.cells for point in group}) > 1]

    def spread(size: int) -> float:
        rests = [[(point.overhead or 0.0) - size * point.cells * point.parallel for point in group] for group in differing]
        return sum(max(rest) - min(rest) for rest in rests)

    size, newest = min((0, *CELL_BYTES), key=spread), CELL_BYTES[-1]
    if not differing or (_is_recent(version) and spread(newest) - spread(size) <= _HEAP_MOVES):
        size = newest
    made = next(iter(groups.values()))[0].cells if groups else 0.0
    return [_without_cells(point, size, made) for point in points]


def _without_cells(point: Point, size: int, made: float) -> Point:
    """``made`` is the cells of the load whose overhead a planned one has."""
    taken = size * point.parallel * (made if point.planned else point.cells)
    more = size * point.parallel * (point.cells - made) if point.planned else 0.0
    beyond_log = None if point.overhead is None else point.overhead - taken
    return msgspec.structs.replace(point, cell_bytes=size, overhead=beyond_log, total=point.total + more)


def with_growth(points: Sequence[Point], reading: float, *, sure: bool = False) -> list[Point]:
    """Points whose overhead is without what grows with the context, where the loads of a batch show that as a straight line.

    The meter is primary: totals on a line are a line, also where the log's parts grow more slowly than they do. Growth within
    what ``reading`` a meter may be off is none, and a fall is none either: memory that was not touched yet comes later. With
    ``sure``, two contexts are enough: that there is growth is known.
    """
    slope = _growth(points, [point.overhead for point in points], reading, sure)
    if not slope:
        return list(points)
    idle = _growth(points, [point.idle_overhead for point in points], reading, sure)
    return [
        msgspec.structs.replace(
            point,
            growth=slope,
            overhead=None if point.overhead is None else point.overhead - slope * point.context,
            idle_overhead=None if point.idle_overhead is None else point.idle_overhead - idle * point.context,
        )
        for point in points
    ]


def _growth(points: Sequence[Point], values: Sequence[float | None], reading: float, sure: bool) -> float:
    """Bytes per token, of the batch with the most contexts; 0 where no line is seen."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for point, value in zip(points, values, strict=True):
        if value is not None:
            groups.setdefault(point.num_batch or 0, []).append((float(point.context), value))
    group = max(groups.values(), key=lambda one: len({x for x, _ in one}), default=[])
    contexts = {x for x, _ in group}
    if len(contexts) < (2 if sure else 3):
        return 0.0
    slope = _slope(group)
    rise, start = slope * (max(contexts) - min(contexts)), fmean(y for _, y in group) - slope * fmean(x for x, _ in group)
    straight = all(abs(y - start - slope * x) <= max(reading, _STRAIGHT * rise) for x, y in group)
    return slope if slope > 0 and (sure or (straight and rise > 2 * reading)) else 0.0


def with_full_pools(points: list[Point]) -> list[Point]:
    """Points as they would be with a full context, where the driver's pool grows with the tokens in the cache.

    Without flash attention CUDA keeps the scores of a batch in its pool, which no log tells of: ``2*heads*u`` bytes a token (an
    H100, llama.cpp b11434: 32 KiB for 32 heads at u = 512, exact to 2 MiB from 8,128 to 32,704 tokens). The slope is measured
    over the loads of a batch, and goes with the batch; it then counts as compute, which grows with the context as well.
    """
    grown = [point for point in points if point.flash_attention == "disabled" and point.overhead is not None and point.filled]
    slopes: dict[int, float] = {}
    for batch in {point.num_batch or 0 for point in grown}:
        values = [(float(p.filled or 0), p.overhead or 0.0) for p in grown if (p.num_batch or 0) == batch]
        if max(x for x, _ in values) >= 2 * min(x for x, _ in values):
            slopes[batch] = max(_slope(values), 0.0)
    if not slopes or len(grown) < len(points):
        return points
    known = max(slopes)
    full = []
    for point in points:
        slope = slopes.get(point.num_batch or 0, slopes[known] * (point.num_batch or 0) / (known or 1))
        rest = slope * max(point.context - (point.filled or 0), 0)
        overhead = (point.overhead or 0.0) + rest - slope * point.context
        full.append(
            msgspec.structs.replace(
                point,
                total=point.total + rest,
                compute=point.compute + slope * point.context,
                pool=slope * point.context,
                overhead=overhead,
            )
        )
    return full


def _slope(values: Sequence[tuple[float, float]]) -> float:
    """Least squares through values at different places."""
    mean_x, mean_y = fmean(x for x, _ in values), fmean(y for _, y in values)
    return sum((x - mean_x) * (y - mean_y) for x, y in values) / sum((x - mean_x) ** 2 for x, _ in values)
