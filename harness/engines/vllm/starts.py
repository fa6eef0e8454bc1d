"""vLLM's few starts: one by its share of the GPU, one by bytes, each again with what a failed one has said."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Final

import msgspec

from harness.engines.vllm.allocation import allocate
from harness.engines.vllm.blocks import VllmStart, block_interval
from harness.engines.vllm.releases import KV_BYTES
from harness.errors import OffloadLikelyError, UnknownVerdictError
from harness.fit.load_plan import LoadOrder, NextLoad
from harness.model.calibration import Calibration
from harness.model.record import Load, LoadRequest, Machine, Record
from harness.text import at_least
from harness.units import format_size, from_gib

#: What of a GPU is left alone, and the most that is asked for.
SHARE_KEPT: Final = 0.02
MOST: Final = 0.9
#: On the host a small cache tells as much as a large one.
HOST_SHARE: Final = 0.25
#: Starts of one length, with what the last one has said.
TRIES: Final = 4


def plan(contexts: Sequence[int], train_context: int | None, num_batch: int | None) -> tuple[LoadRequest, ...]:
    """Two starts: the longest length by share, the shortest by bytes. Lengths are whole blocks (multiples of 256)."""
    wanted = sorted({max(context // 256 * 256, 256) for context in contexts})
    if train_context is not None:
        wanted = [context for context in wanted if context <= train_context] or [train_context // 256 * 256 or train_context]
    if len(wanted) == 1:
        wanted = [max(wanted[0] // 512 * 256, 256), wanted[0]]
    return tuple(LoadRequest(context=context, num_batch=num_batch) for context in (wanted[-1], wanted[0]))


def order(loads: Sequence[LoadRequest], machine: Machine, free_bytes: Callable[[str], int | None]) -> LoadOrder:
    """The starts of a run; ``free_bytes`` is what is free on a GPU, by its UUID."""
    if any(load.utilization is not None or load.kv_cache_bytes is not None for load in loads):
        for request in loads:  # a plan that was made before, with everything in it
            yield NextLoad(request)
        return
    share = first_share(machine, free_bytes)
    first = msgspec.structs.replace(loads[0], utilization=share)
    load = yield from _until_it_starts(first)
    if load is None:
        return
    if load.facts is not None and load.facts.vllm is not None and load.facts.vllm.compiled:
        # Compiling took memory that a start from the cache does not: that one counts.
        load = yield NextLoad(load.request, added=True)
    short = min(loads[-1].context, load.request.context)
    version = (load.reported and load.reported.version) or (load.facts.engine_version if load.facts else None)
    size = exact_bytes(load, short) if at_least(version, KV_BYTES) else None
    yield NextLoad(msgspec.structs.replace(load.request, context=short, kv_cache_bytes=size))


def _until_it_starts(request: LoadRequest) -> Generator[NextLoad, Load, Load | None]:
    """The load that became ready; ``None`` if none did."""
    for tries in range(TRIES):
        load = yield NextLoad(request, added=tries > 0)
        if load.outcome == "ok":
            return load
        again = corrected(load)
        if again is None:
            return None
        request = again
    return None


def corrected(load: Load) -> LoadRequest | None:
    """The request once more with what the failed start has said; ``None`` where it does not help."""
    facts = load.facts.vllm if load.facts else None
    request = load.request
    if facts is None:
        return None
    if facts.failure_class == "memory_moved":
        return request
    if facts.failure_class == "free_below_utilization" and facts.free_bytes and facts.total_bytes:
        share = _share(facts.free_bytes / facts.total_bytes)
        usable = share >= 0.05 and share < (request.utilization or 1.0)
        return msgspec.structs.replace(request, utilization=share) if usable else None
    if facts.failure_class in ("kv_too_small", "context_too_long"):
        longest = facts.estimated_max_model_len or request.context // 2
        context = min(longest, request.context - 256) // 256 * 256
        return msgspec.structs.replace(request, context=context) if context >= 256 else None
    return None


def exact_bytes(load: Load, context: int) -> int | None:
    """A KV cache for one sequence of ``context`` tokens, one block to spare and the one that is never used."""
    if load.facts is None or load.facts.vllm is None:
        return None
    start = VllmStart(load, load.facts.vllm)
    size, interval, need = start.block_size, block_interval(start), start.of_sequence
    if size is None or interval is None or need is None:
        return None
    dense = -(-context // size)
    hybrid = need != -(-start.context // size)  # one length does not say what a hybrid needs at another
    return (max(need, dense) if hybrid else dense) * int(interval[1]) + 2 * int(interval[1])


def first_share(machine: Machine, free_bytes: Callable[[str], int | None]) -> float:
    """The share of each GPU to ask for: what is free on the fullest, less a little."""
    if machine.target == "host":
        return HOST_SHARE
    shares = [
        free / from_gib(gpu.memory_gb)
        for gpu in machine.gpus
        if gpu.uuid and gpu.memory_gb and (free := free_bytes(gpu.uuid)) is not None
    ]
    return min(_share(min(shares)), MOST) if shares else MOST


def said(load: Load) -> str:
    """What a start was given, and how many blocks it made of it; memory alone is no point of a line."""
    given = load.request.kv_cache_bytes
    blocks = load.reported.num_blocks if load.reported else None
    what = f"a share of {load.request.utilization}" if given is None else f"{format_size(given)} of KV cache"
    return f"{what}: {blocks if blocks is not None else 'unknown'} blocks"


def _share(free: float) -> float:
    return int((free - SHARE_KEPT) * 100) / 100


def allocated(calibration: Calibration, request: LoadRequest, sequences: int, available: tuple[int, ...] | None) -> LoadRequest:
    """A start to serve with, given exactly what its sequences need; left as it is where that is not to be had."""
    if not available:
        return request
    try:
        granted = allocate(calibration, request.context, sequences, available)
    except (OffloadLikelyError, UnknownVerdictError):
        return request
    exact = granted.kv_cache_bytes if granted.lever == "kv-cache-memory-bytes" else None
    return msgspec.structs.replace(request, utilization=granted.utilization, kv_cache_bytes=exact)


def speed_request(record: Record) -> LoadRequest | None:
    """The start under which speeds are timed: the last one that became ready."""
    ready = [load for load in record.loads if load.outcome == "ok" and load.request.purpose == "point"]
    return msgspec.structs.replace(ready[-1].request, purpose="speed") if ready else None
