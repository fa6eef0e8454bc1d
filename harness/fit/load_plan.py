"""Which loads a calibration makes: few, and enough for every band that a user will meet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Final, NamedTuple

from harness.errors import UntrustedError
from harness.fit.batch_fit import bends, curvature, fit_batches, is_steep
from harness.fit.observations import points_of, spill_reason, understood
from harness.model.record import Load, LoadRequest, Record, Target
from harness.units import CELL_PADDING

#: Contexts where none are asked for.
DEFAULT_CONTEXTS: Final = (8192, 16384, 32768)
#: A plan never grows beyond this.
MAX_LOADS: Final = 5
#: Contexts below this are not worth a load of their own.
SMALLEST_KNEE: Final = 2048
#: llama.cpp's physical batch where it is unset (common.h, ``n_ubatch``).
DEFAULT_BATCH: Final = 512

BatchLimits = tuple[tuple[int, int], ...]


class NextLoad(NamedTuple):
    """The load that comes next; ``added`` comes on top of the plan. ``skipped`` says why it is noted and not made."""

    request: LoadRequest
    added: bool = False
    skipped: str | None = None


#: Yields what comes next and is sent each load as it was made.
LoadOrder = Generator[NextLoad, Load, None]


def usable_contexts(contexts: Sequence[int], train_context: int | None, floor: int = CELL_PADDING) -> tuple[int, ...]:
    """The contexts of a plan, in ascending order, shrunk to a model trained on less.

    A model trained on fewer tokens than asked for keeps the number of loads: halves and quarters of its own context, but
    none below ``floor``: an engine cuts its batch to a shorter context, and that would be another line.
    """
    wanted = sorted(set(contexts))
    if train_context is None or all(context <= train_context for context in wanted):
        return tuple(wanted)
    kept = [context for context in wanted if context < train_context]
    candidates = [train_context, *(train_context * part // 4 // 256 * 256 for part in (2, 1, 3))]
    for candidate in candidates:
        if len(kept) >= max(len(wanted), 2):
            break
        if (candidate >= floor or candidate == train_context) and candidate not in kept:
            kept.append(candidate)
    return tuple(sorted(kept)) or (train_context,)


def slot_limits(limits: BatchLimits, num_parallel: int) -> BatchLimits:
    """An engine's batch rule by the tokens of one slot; the engine goes by the tokens of all slots together."""
    return tuple((limit // num_parallel, batch) for limit, batch in limits)


def plan_loads(
    contexts: Sequence[int],
    train_context: int | None,
    *,
    num_batch: int | None = None,
    batch_limits: BatchLimits = (),
    num_parallel: int = 1,
) -> tuple[LoadRequest, ...]:
    """The loads that measure memory.

    With a pinned batch, or an engine of one batch, the contexts are loaded at that batch. With an engine that chooses the
    batch by context (``batch_limits``: largest context of all slots and batch, ascending), the band of the largest context gets
    all contexts, sent with its batch explicitly, and each lower band one load at its upper end.
    """
    if num_batch is not None or not batch_limits:
        batch = num_batch or DEFAULT_BATCH
        usable = usable_contexts(contexts, train_context, batch)
        return tuple(LoadRequest(context=context, num_batch=batch) for context in usable)
    reach = train_context or max(contexts)
    limits = slot_limits(batch_limits, num_parallel)
    bands = [(limit, batch) for index, (limit, batch) in enumerate(limits) if index == 0 or limits[index - 1][0] < reach]
    # An engine cuts its batch to a shorter context: contexts that are all meant stay at a batch that each of them fills.
    bands = [band for band in bands if band[1] <= min(contexts)] or bands[:1]
    top = bands[-1][1]
    usable = usable_contexts(contexts, train_context, top)
    lower = [LoadRequest(context=max(min(limit, 16384), batch), num_batch=batch) for limit, batch in bands[:-1]]
    return (*lower, *(LoadRequest(context=context, num_batch=top) for context in usable))


def still_covers(before: Sequence[LoadRequest], now: Sequence[LoadRequest]) -> bool:
    """Whether a plan from before is of the batches that one made now asks for; each batch is a line of its own."""
    return {load.num_batch for load in before} == {load.num_batch for load in now}


def further_loads(record: Record) -> tuple[LoadRequest, ...]:
    """Loads that the loads made so far ask for, up to :data:`MAX_LOADS` in all.

    Without flash attention the compute buffers step where a sliding window is full, so both sides need loads of their own.
    Where they bend between the loads, with or without it, both lines are measured. A line that is steeper than one mask has a
    load below the others as well.
    """
    try:
        points, _ = points_of(record)
        fits = fit_batches(points) if points else []
    except UntrustedError:
        return ()
    if not fits:
        return ()
    fitted, room = fits[-1], MAX_LOADS - sum(load.request.purpose == "point" for load in record.loads)
    if len(fits) > 1:
        return ()
    contexts = sorted({point.context for point in fitted.points})
    wanted: list[int] = []
    window = None if fitted.points[0].flash_attention == "enabled" else fitted.window_cells
    if window is not None and window > SMALLEST_KNEE and contexts[0] > window:
        wanted.append(window // 2)
    if window is not None and contexts[-2] <= window < contexts[-1]:
        wanted.append((window + contexts[-1]) // 2)
    if bends(fitted):
        wanted += [contexts[0] // 2, (contexts[-2] + contexts[-1]) // 2]
    elif is_steep(fitted):
        wanted.append(contexts[0] // 4)
    floor = max(fitted.num_batch or DEFAULT_BATCH, CELL_PADDING)
    usable = [context // CELL_PADDING * CELL_PADDING for context in wanted]
    return tuple(
        LoadRequest(context=context, num_batch=fitted.num_batch)
        for context in usable[: max(room, 0)]
        if context >= floor and context not in contexts
    )


def needs_plans(record: Record) -> bool:
    """Whether compute buffers may leave the line of the loads: they bend, or f16 copies of an f32 cache come on top of it."""
    try:
        points, _ = points_of(record)
        fits = fit_batches(points) if points else []
    except UntrustedError:
        return False
    cast = any("f32" in (point.kv_cache_type or "") and point.flash_attention == "enabled" for point in points)
    return cast or any(bends(fitted) or curvature(fitted) for fitted in fits)


def is_point(load: Load, target: Target) -> bool:
    """Whether a load lay completely on the target, or became ready and has a log that does not say where it is."""
    if load.outcome != "ok":
        return False
    if load.facts is None or not understood(load.facts):
        return load.ready is not None
    return spill_reason(load.facts, target, ready=load.ready is not None) is None


def smaller_first(planned: Sequence[LoadRequest], record: Callable[[], Record]) -> LoadOrder:
    """Loads by batch and context; what is above a context that did not fit is skipped, and what the loads ask for is added."""
    limit = None
    for request in sorted(planned, key=lambda load: (load.num_batch or 0, load.context)):
        if limit is not None and request.context >= limit:
            yield NextLoad(request, skipped=f"{limit:,} tokens did not fit already")
            continue
        load = yield NextLoad(request)
        if not is_point(load, record().machine.target):
            limit = min(limit or request.context, request.context)
    for request in smaller_contexts(record(), limit) or further_loads(record()):
        yield NextLoad(request, added=True)


def smaller_contexts(record: Record, limit: int | None) -> tuple[LoadRequest, ...]:
    """Loads between the contexts that fitted, when larger ones did not and fewer than three are left."""
    if limit is None:
        return ()
    fitted = sorted({load.request.context for load in record.loads if is_point(load, record.machine.target)})
    batch = record.loads[-1].request.num_batch
    low = fitted[0] if fitted else limit
    candidates = [low // 2, low * 3 // 4] if len(fitted) < 2 else [(fitted[0] + fitted[-1]) // 2]
    floor = batch or DEFAULT_BATCH
    usable = [context // 256 * 256 for context in candidates if context // 256 * 256 >= floor]
    return tuple(LoadRequest(context=context, num_batch=batch) for context in usable[: max(3 - len(fitted), 0)])
