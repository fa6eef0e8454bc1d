"""From starts of vLLM to constants: what one instance takes on each GPU beside its KV cache, and what a block costs.

vLLM fills what it is given, so its base is no meter's intercept. ``requested - available`` is what the utilisation has to
cover (weights, non-torch, peak activation; from 0.20 on an estimate of the CUDA graphs): the budget. With the graphs as
captured it is the footprint. Blocks are whole: two starts at different lengths and sizes give their cost exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

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
from harness.model.record import Load, Record, VllmSettings
from harness.text import at_least
from harness.units import GIB, TOKENS_PER_UNIT, format_size, gib

#: A figure with two decimals of GiB may be off by this.
ROUNDING: Final = GIB // 200
#: A block is a whole number of these: no tensor of a KV cache is smaller.
_GRAIN: Final = 512
#: The driver's figure may differ from the log's by this on each GPU (torch keeps freed memory).
METER_TOLERANCE: Final = round(0.3 * GIB)
MAX_ERROR: Final = 0.01


class VllmStart(msgspec.Struct, frozen=True):
    """One start that became ready."""

    load: Load
    facts: VllmFacts

    @property
    def context(self) -> int:
        """The length that it was checked for."""
        said = self.load.reported
        return (said and said.context) or self.facts.max_model_len or self.load.request.context

    @property
    def block_size(self) -> int | None:
        """Tokens of a block."""
        said = self.load.reported
        return (said and said.block_size) or self.facts.block_size

    @property
    def number(self) -> int | None:
        """Blocks, from the running engine or from its log."""
        said = self.load.reported
        number = (said and said.num_blocks) or self.facts.num_gpu_blocks
        if number is None and self.facts.kv_tokens and self.block_size and self.facts.kv_tokens % self.block_size == 0:
            return self.facts.kv_tokens // self.block_size
        return number

    @property
    def of_sequence(self) -> int | None:
        """Blocks of one sequence of the full length: blocks over concurrency, which the log rounds to two decimals."""
        said = self.load.reported
        exact = said.max_concurrency if said else None
        times, off = (exact, 0.0001) if exact else (self.facts.max_concurrency, 0.005)
        if self.number is None or not times or times <= off:
            return None
        dense = None if self.block_size is None else -(-self.context // self.block_size)
        low, high = self.number / (times + off), self.number / (times - off)
        if dense is not None and low <= dense <= high:
            return dense
        nearest = round(self.number / times)
        return nearest if low <= nearest <= high and high - low < 1 else None


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


def block_interval(start: VllmStart) -> tuple[float, float] | None:
    """The bytes of a block lie above the first and at most at the second: the engine rounds down to whole blocks."""
    number, given = start.number, start.load.request.kv_cache_bytes
    if not number:
        return None
    if given is not None:
        return given / (number + 1), given / number
    available = [worker.kv_available_bytes for worker in start.facts.workers if worker.kv_available_bytes is not None]
    if not available:
        return None
    return (min(available) - ROUNDING) / (number + 1), (min(available) + ROUNDING) / number


def block_bytes(starts: Sequence[VllmStart]) -> int:
    """The bytes of a block: of all that the starts allow, the roundest number in binary, as products of sizes are.

    Raises:
        UntrustedError: the starts contradict each other, or say nothing.
    """
    intervals = [interval for start in starts if (interval := block_interval(start)) is not None]
    if not intervals:
        raise UntrustedError("neither the engine nor its log names the blocks of the KV cache", code="no-blocks")
    low, high = int(max(one[0] for one in intervals)), int(min(one[1] for one in intervals))
    if low >= high:
        raise UntrustedError("the starts contradict each other about the size of a block", code="blocks-disagree")
    grain = 1 << high.bit_length()
    while grain > _GRAIN and high // grain * grain <= low:
        grain >>= 1
    exact = high // grain * grain
    return exact if exact > low else high  # without a round number the largest that is possible is safe


def fit_blocks(starts: Sequence[VllmStart]) -> KvBlocks:
    """Blocks by sequence and length.

    Raises:
        UntrustedError: the lengths do not lie on a line of whole blocks, or are too few for a hybrid model.
    """
    size = starts[0].block_size
    if size is None or any(start.block_size != size for start in starts):
        raise UntrustedError("the block size is not known, or differs between starts", code="no-blocks")
    cost = block_bytes(starts)
    needs = sorted({(-(-start.context // size), need) for start in starts if (need := start.of_sequence) is not None})
    if not needs:
        raise UntrustedError("the concurrency that would tell blocks per sequence was not said", code="no-blocks")
    if all(blocks == need for blocks, need in needs):
        return KvBlocks(size=size, bytes=cost)
    (first, low), (last, high) = needs[0], needs[-1]
    if first == last:
        raise UntrustedError("a hybrid model needs two different lengths", hint="--ctx 8192,32768", code="too-few-points")
    per_block = (high - low) / (last - first)
    fixed = low - per_block * first
    if per_block != int(per_block) or per_block < 1 or fixed < 0:
        raise UntrustedError("the blocks of a sequence are not a straight line over its length", code="not-a-line")
    return KvBlocks(size=size, bytes=cost, per_block=int(per_block), fixed=int(fixed))


def _left_out(starts: Sequence[VllmStart]) -> float | None:
    """The worst relative error of a start's blocks as the others predict them, beyond what the log's rounding allows."""
    errors = []
    for left in starts:
        others = [start for start in starts if start is not left and block_interval(start) is not None]
        interval = block_interval(left)
        if left.number is None or interval is None or not others:
            continue
        cost = block_bytes(others)
        low, high = (int(edge * number / cost) for edge, number in zip(interval, (left.number + 1, left.number), strict=True))
        errors.append(max(low - left.number, left.number - high, 0) / left.number)
    return max(errors) if errors else None


class _Part(msgspec.Struct, frozen=True):
    """One GPU beside its KV cache, bytes."""

    weights: int | None
    activation: int
    graphs: int
    budget: int
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
    if not sized:
        raise UntrustedError(
            "no start by utilisation became ready, so there is nothing to fit", hint="; ".join(notes) or None, code="no-points"
        )
    main = max(sized, key=lambda start: start.context)
    version = (main.load.reported and main.load.reported.version) or main.facts.version or record.engine.version
    blocks = fit_blocks(starts)
    parts = [part for worker in main.facts.workers if (part := part_of(worker, main.facts, version)) is not None]
    if not parts:
        raise UntrustedError("the log does not say what the engine takes beside its KV cache", code="no-points")
    part = max(parts, key=lambda one: one.footprint)
    beside = [found for start in starts if (found := _beside(start, blocks, record)) is not None]
    spread = max(beside) - min(beside) if len(beside) > 1 else None
    if beside and (record.machine.meter == "host" or _imported_on_host(record)):
        part = _on_host(part, beside, spread, starts)
    breakdown, part_notes = _breakdown(part, parts, blocks, record)
    pieces = (breakdown.weights, breakdown.fixed_cache, breakdown.compute, breakdown.overhead)
    base = round(sum(piece or 0.0 for piece in pieces), 6)
    slope = gib(blocks.per_block * blocks.bytes / blocks.size * TOKENS_PER_UNIT)
    error = _left_out(starts)
    if error is not None and error > MAX_ERROR:
        raise UntrustedError(f"a start left out is predicted with an error of {error:.2%} in its blocks", code="not-a-line")
    notes += part_notes + _meter_notes(starts, part, blocks, record)
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
    return Breakdown(weights=known, fixed_cache=fixed, compute=compute, overhead=overhead, budget=gib(part.budget)), notes


def _beside(start: VllmStart, blocks: KvBlocks, record: Record) -> float | None:
    """What the meter saw beside the KV cache, on each GPU; ``None`` where it saw nothing."""
    total = _plateau(start, record)
    if total is None or start.number is None:
        return None
    return total / _gpus(start) - start.number * blocks.bytes


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
    size = total / _gpus(start) if total is not None else part.footprint + (start.number or 0) * blocks.bytes
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
