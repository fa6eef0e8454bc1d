"""Which loads a calibration makes: few, and enough for every band that a user will meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from harness.core.record import LoadRequest

#: Contexts when nobody asks for others.
DEFAULT_CONTEXTS: Final = (8192, 16384, 32768)
#: llama.cpp's physical batch when nobody sets one (common.h, ``n_ubatch``).
DEFAULT_BATCH: Final = 512

BatchLimits = tuple[tuple[int, int], ...]


def usable_contexts(contexts: Sequence[int], train_context: int | None) -> tuple[int, ...]:
    """The contexts of a plan, in ascending order, shrunk to a model trained on less.

    A model trained on fewer tokens than asked for keeps the number of loads: halves and quarters of its own context.
    """
    wanted = sorted(set(contexts))
    if train_context is None or all(context <= train_context for context in wanted):
        return tuple(wanted)
    kept = [context for context in wanted if context < train_context]
    candidates = [train_context, *(train_context * part // 4 // 256 * 256 for part in (2, 1, 3))]
    for candidate in candidates:
        if len(kept) >= max(len(wanted), 2):
            break
        if candidate >= 256 and candidate not in kept:
            kept.append(candidate)
    return tuple(sorted(kept)) or (train_context,)


def plan_loads(
    contexts: Sequence[int],
    train_context: int | None,
    *,
    num_batch: int | None = None,
    batch_limits: BatchLimits = (),
) -> tuple[LoadRequest, ...]:
    """The loads that measure memory.

    With a pinned batch, or an engine of one batch, the contexts are loaded at that batch. With an engine that chooses the
    batch by context (``batch_limits``: largest context and batch, ascending), the band of the model's largest context gets
    all contexts, sent with its batch explicitly, and each lower band one load at its upper end.
    """
    usable = usable_contexts(contexts, train_context)
    if num_batch is not None or not batch_limits:
        return tuple(LoadRequest(context=context, num_batch=num_batch or DEFAULT_BATCH) for context in usable)
    reach = train_context or usable[-1]
    bands = [
        (limit, batch) for index, (limit, batch) in enumerate(batch_limits) if index == 0 or batch_limits[index - 1][0] < reach
    ]
    top = bands[-1][1]
    lower = [LoadRequest(context=min(limit, 16384), num_batch=batch) for limit, batch in bands[:-1]]
    return (*lower, *(LoadRequest(context=context, num_batch=top) for context in usable))
