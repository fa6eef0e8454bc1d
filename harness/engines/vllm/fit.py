"""From starts of vLLM to constants: what one instance takes on each GPU beside its KV cache, and what a block costs.

vLLM fills what it is given, so its base is no meter's intercept. ``requested - available`` is what the utilisation has to
cover (weights, non-torch, peak activation; from 0.20 on an estimate of the CUDA graphs): the budget. With the graphs as
captured it is the footprint. Blocks are whole: two starts at different lengths and sizes give their cost exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from harness.engines.vllm.blocks import VllmStart, fit_blocks, left_out
from harness.engines.vllm.releases import GRAPHS_IN_BUDGET
from harness.errors import UntrustedError
from harness.fit.artifact import calibration_of
from harness.fit.observations import allowed_spread
from harness.model.calibration import (
    Band,
    Breakdown,
    Calibration,
    KvBlocks,
    MeasuredLoad,
)
from harness.model.facts import VllmFacts, WorkerFacts
from harness.model.record import Record, VllmSettings
from harness.text import at_least
from harness.units import GIB, TOKENS_PER_UNIT, format_size, gib

#: The driver's figure may differ from the log's by this on each GPU (torch keeps freed memory).
METER_TOLERANCE: Final = round(0.3 * GIB)
MAX_ERROR: Final = 0.01


def starts_of(record: Record) -> tuple[list[VllmStart], list[str]]:
    """The starts that became ready, and notes about the others."""
    starts, notes = [], []
    for load in record.loads:
        if load.request.purpose != "point":
            continue
        if load.outcome == "ok" and load.facts is not None and load.facts.vllm is not None and load.facts.complete:
            starts.append(VllmStart(load, load.facts.vllm))
        else:
            why = load.reason or (load.facts.failure if load.facts else None) or load.outcome
            notes.append(f"context {load.request.context:,}: {why}")
    return starts, notes


class _Part(msgspec.Struct, frozen=True):
    """One GPU beside its KV cache, bytes."""

    weights: int | None
    activation: int
    graphs: int
    budget: int | None
    footprint: int


def part_of(worker: WorkerFacts, facts: VllmFacts, version: str | None) -> _Part | None:
    """One GPU beside its KV cache; ``None`` where the log does not say."""
    consumed = worker.consumed_bytes
    if consumed is None and worker.weights_bytes is not None and worker.non_torch_bytes is not None:
        consumed = worker.weights_bytes + worker.non_torch_bytes
    activation = worker.peak_activation_bytes
    if facts.requested_bytes is not None and worker.kv_available_bytes is not None:
        budget = facts.requested_bytes - worker.kv_available_bytes
    elif consumed is not None and activation is not None:
        budget = consumed + activation
    else:
        return None
    graphs = worker.cuda_graph_bytes or 0
    estimated = worker.cuda_graph_estimated_bytes or 0
    footprint = budget + graphs - (estimated if at_least(version, GRAPHS_IN_BUDGET) else 0)
    return _Part(worker.weights_bytes, activation or 0, graphs, budget, footprint)


def fit_vllm(record: Record) -> Calibration:
    """The calibration of a record of vLLM. Pure: the same record gives the same bytes.

    Raises:
        UntrustedError: no start by utilisation came up, or the starts contradict each other.
    """
    starts, notes = starts_of(record)
    sized = [start for start in starts if start.load.request.kv_cache_bytes is None]
    imported = record.machine.meter == "import"
    if imported and record.machine.target == "gpu":
        sized = sized or [start for start in starts if _plateau(start, record) is not None]
    if not sized:
        raise UntrustedError(
            "no start by utilisation became ready, so there is nothing to fit", hint="; ".join(notes) or None, code="no-points"
        )
    main = max(sized, key=lambda start: start.context)
    version = (main.load.reported and main.load.reported.version) or main.facts.version or record.engine.version
    blocks, lengths = fit_blocks(starts, whole=imported), {start.context for start in starts}
    parts = [part for worker in main.facts.workers if (part := part_of(worker, main.facts, version)) is not None]
    beside = [found for start in starts if (found := _beside(start, blocks, record)) is not None]
    if imported and not parts and beside:
        weights = max((worker.weights_bytes or 0 for worker in main.facts.workers), default=0)
        parts = [_Part(weights or None, 0, 0, None, round(max(beside)))]
        notes.append("what it takes beside its KV cache is the total that was given: it holds activations and CUDA graphs")
    if not parts:
        raise UntrustedError("the log does not say what the engine takes beside its KV cache", code="no-points")
    part = max(parts, key=lambda one: one.footprint)
    spread = max(beside) - min(beside) if len(beside) > 1 else None
    if beside and (record.machine.meter == "host" or _imported_on_host(record)):
        part = _on_host(part, beside, spread, starts)
    breakdown, part_notes = _breakdown(part, parts, blocks, record)
    pieces = (breakdown.weights, breakdown.fixed_cache, breakdown.compute, breakdown.overhead)
    base = round(sum(piece or 0.0 for piece in pieces), 6)
    slope = gib(blocks.per_block * blocks.bytes / blocks.size * TOKENS_PER_UNIT)
    error = left_out(starts)
    if error is not None and error > MAX_ERROR:
        raise UntrustedError(f"a start left out is predicted with an error of {error:.2%} in its blocks", code="not-a-line")
    notes += part_notes + _meter_notes(starts, part, blocks, record)
    if blocks.bound:
        notes.append(
            f"the logs do not say how the KV cache grows: {min(lengths):,} and {max(lengths):,} tokens take their share of it, "
            "so fewer take at most theirs, 256 tokens and the rounding of the logs more"
        )
    elif blocks.size != main.block_size:
        notes.append(
            f"the log does not say how the KV cache of one sequence grows: one of up to {blocks.size:,} tokens is bounded by "
            "what the full length takes (a log with VLLM_LOGGING_LEVEL=DEBUG names the blocks, and is exact"
            f"{_other_length(lengths)})"
        )
    if error is None:
        notes.append("max_error was not measured: it needs a second start by bytes")
    vllm = _settings(record, main)
    facts = main.load.facts
    band = Band(
        up_to=record.model.train_context or max(start.context for start in starts), num_batch=vllm.max_num_batched_tokens,
        base_vram_gb=base, kv_cache_gb_per_10k=slope, compute_gb_per_10k=0.0, fixed_cache_gb=breakdown.fixed_cache,
    )  # fmt: skip
    return calibration_of(
        record,
        (band,),
        breakdown,
        settings=msgspec.structs.replace(
            record.settings,
            num_batch=vllm.max_num_batched_tokens,
            kv_cache_type=(facts and facts.kv_cache_type) or record.settings.kv_cache_type,
            flash_attention=facts.flash_attention if facts else None,
            vllm=vllm,
        ),
        loads=(_measured(start, part, blocks, record) for start in starts),
        max_error=error,
        spread=spread,
        notes=notes,
        model=msgspec.structs.replace(record.model, quantization=record.model.quantization or vllm.quantization),
        engine=msgspec.structs.replace(record.engine, version=version),
        machine=msgspec.structs.replace(
            record.machine, total_cuda_gb=None if main.facts.total_bytes is None else gib(main.facts.total_bytes)
        ),
        kv_blocks=blocks,
    )


def _breakdown(part: _Part, parts: Sequence[_Part], blocks: KvBlocks, record: Record) -> tuple[Breakdown, list[str]]:
    notes = []
    weights = part.weights
    if weights is None:
        weights = next((one.weights for one in parts if one.weights is not None), None)
    if weights is None and record.tensors is not None:
        weights = sum(record.tensors.layer_bytes) + record.tensors.output_bytes + record.tensors.embedding_bytes
        notes.append("the log does not say what the weights take: theirs is the size of the model's files")
    if weights is None:
        notes.append("the log does not say what the weights take: they are in the overhead")
    known = gib(weights or 0)
    compute = gib(part.activation + part.graphs)
    overhead = round(gib(part.footprint) - known - compute, 6)
    if overhead < 0:  # activation and graphs share memory with what they are estimated beside
        compute, overhead = round(max(compute + overhead, 0.0), 6), 0.0
    fixed = gib(blocks.fixed * blocks.bytes)
    return Breakdown(
        weights=known,
        fixed_cache=fixed,
        compute=compute,
        overhead=overhead,
        budget=None if part.budget is None else gib(part.budget),
    ), notes


def _other_length(lengths: set[int]) -> str:
    """What logs of one length, or of several, say more of the growth."""
    if len(lengths) == 1:
        return "; where no layer has a window or a state, a second log of another length narrows it to the logs' rounding"
    return f"; {min(lengths):,} and {max(lengths):,} tokens do not show that it grows with the tokens alone"


def _beside(start: VllmStart, blocks: KvBlocks, record: Record) -> float | None:
    """What the meter saw beside the KV cache, on each GPU; ``None`` where it saw nothing."""
    total = _plateau(start, record)
    if total is None or (cache := _cache(start, blocks)) is None:
        return None
    return total / _gpus(start) - cache


def _cache(start: VllmStart, blocks: KvBlocks) -> int | None:
    """The KV cache of a start on each GPU, bytes: its blocks, else what the log says."""
    by_blocks = start.number is not None and blocks.size == start.block_size and not blocks.bound
    return (start.number or 0) * blocks.bytes if by_blocks else start.available


def _plateau(start: VllmStart, record: Record) -> int | None:
    plateau = start.load.idle if record.machine.target == "host" else start.load.busy or start.load.idle
    return plateau.total_bytes if plateau else None


def _imported_on_host(record: Record) -> bool:
    return (record.machine.meter, record.machine.target) == ("import", "host")


def _gpus(start: VllmStart) -> int:
    return max((start.facts.tensor_parallel or 1) * (start.facts.pipeline_parallel or 1), 1)


def _on_host(part: _Part, beside: Sequence[float], spread: float | None, starts: Sequence[VllmStart]) -> _Part:
    """On the host the log knows the worker alone; the meter counts every process of the engine."""
    largest = max(load.total_bytes or 0 for start in starts if (load := start.load.idle) is not None)
    allowed = allowed_spread(largest)
    if spread is not None and spread > allowed:
        raise UntrustedError(
            f"what the engine takes beside its KV cache differs between starts by {format_size(spread)} (allowed: "
            f"{format_size(allowed)})",
            hint="calibrate again while nothing else runs",
            code="overhead-moves",
        )
    return _Part(part.weights, part.activation, part.graphs, part.budget, round(max(beside)))


def _measured(start: VllmStart, part: _Part, blocks: KvBlocks, record: Record) -> MeasuredLoad:
    """What one GPU took: the meter's figure over the GPUs, else what the log adds up to."""
    total = _plateau(start, record)
    size = total / _gpus(start) if total is not None else part.footprint + (_cache(start, blocks) or 0)
    return MeasuredLoad(context=start.context, num_batch=start.load.request.num_batch, total_gb=gib(size))


def _meter_notes(starts: Sequence[VllmStart], part: _Part, blocks: KvBlocks, record: Record) -> list[str]:
    if record.machine.meter not in ("nvml", "import"):
        return []
    return [
        f"context {start.context:,}: the driver counts {format_size(beside)} beside the KV cache, the log "
        f"{format_size(part.footprint)}"
        for start in starts
        if (beside := _beside(start, blocks, record)) is not None and abs(beside - part.footprint) > METER_TOLERANCE
    ]


def _settings(record: Record, main: VllmStart) -> VllmSettings:
    """The settings as asked for, with what the log says was in force."""
    asked, facts = record.settings.vllm, main.facts
    if asked is None:
        raise UntrustedError("the record does not hold vLLM's settings", code="bad-record")
    num_batch = main.load.facts.num_batch if main.load.facts else None
    return msgspec.structs.replace(
        asked,
        tensor_parallel=facts.tensor_parallel or asked.tensor_parallel,
        pipeline_parallel=facts.pipeline_parallel or asked.pipeline_parallel,
        max_num_batched_tokens=num_batch or asked.max_num_batched_tokens,
        dtype=facts.dtype or asked.dtype,
        quantization=facts.quantization or asked.quantization,
        enforce_eager=asked.enforce_eager if facts.enforce_eager is None else facts.enforce_eager,
    )
