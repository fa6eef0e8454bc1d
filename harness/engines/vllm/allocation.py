"""The options with which vLLM starts with a context, from a calibration: exact by blocks, or refused with the reason.

From 0.10.2 on the KV cache is given in bytes (``--kv-cache-memory-bytes``), which leaves nothing to chance. Older releases
size it by what is left of the utilisation after profiling, so that the profile's spread is added. In both cases vLLM demands
that ``utilisation * total`` is free when it starts (``request_memory``, vllm/v1/worker/utils.py).
"""

from __future__ import annotations

from typing import Final

import msgspec

from harness.engines.vllm.blocks import LINE_ABOVE
from harness.engines.vllm.releases import GRAPHS_IN_BUDGET, KV_BYTES
from harness.errors import OffloadLikelyError, UnknownVerdictError
from harness.model.calibration import Calibration, KvBlocks
from harness.model.record import VllmSettings
from harness.prediction.allocation import Allocation, Deployment
from harness.prediction.memory import beyond_range, is_bound
from harness.text import at_least, counted
from harness.units import GIB, format_size, from_gib

#: What profiling differs by from start to start (older releases, which are sized by it).
JITTER: Final = round(0.3 * GIB)
#: What stays free on a GPU beside an instance: the larger of the two.
MARGIN: Final = round(0.15 * GIB)
MARGIN_SHARE: Final = 0.02
#: Spare blocks of a hybrid model, whose groups of layers are rounded one by one.
HYBRID_SPARE: Final = 0.02
#: Utilisations are written with four decimals.
_STEPS: Final = 10_000
#: The block that vLLM never uses (vllm/v1/core/block_pool.py, ``null_block``); older releases have it too.
NULL_BLOCKS: Final = 1


class _Card(msgspec.Struct, frozen=True):
    """A GPU and an instance on it, bytes. ``budget`` is what the utilisation has to cover beside the cache."""

    total: int
    free: int
    footprint: int
    budget: int | None
    by_bytes: bool
    graphs_on_top: bool

    @property
    def margin(self) -> int:
        return max(MARGIN, round(MARGIN_SHARE * self.total)) if self.by_bytes else 0

    def room(self) -> int:
        """What the KV cache may take at most; below zero where not even the rest fits."""
        if self.by_bytes:
            return self.free - self.margin - self.footprint
        return self.total * self.top_steps() // _STEPS - (self.budget or 0) - JITTER

    def top_steps(self) -> int:
        """The largest utilisation whose memory is free, in ten-thousandths. Graphs lay on top of it until 0.19."""
        graphs = max(self.footprint - (self.budget or 0), 0) if self.graphs_on_top else 0
        return min(_STEPS * max(self.free - graphs, 0) // self.total, _STEPS)

    def steps(self, kv: int) -> int:
        """The utilisation for a cache of ``kv`` bytes, in ten-thousandths."""
        if self.by_bytes:  # only looked at when vLLM asks whether so much is free: what it will really take
            return min(max(_STEPS * (self.footprint + kv) // self.total, 1), 9900)
        return -(-_STEPS * ((self.budget or 0) + kv + JITTER) // self.total)


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """What a number of sequences needs on each GPU; bytes. ``short_bytes`` is what is missing there, 0 if it fits.

    ``bounded``: what a sequence takes is known as a bound below the full length.
    """

    vllm: VllmSettings
    kv_blocks: KvBlocks
    card: _Card
    blocks: int
    spare_blocks: int
    kv_cache_bytes: int
    required_bytes: int
    margin_bytes: int
    short_bytes: int
    max_context: int
    bounded: bool


def mismatches(calibration: Calibration, wanted: Deployment) -> list[str]:
    """In what a calibration differs from what will run; empty where it answers for it."""
    metadata, vllm = calibration.metadata, calibration.metadata.settings.vllm
    if vllm is None:
        return [f"it is one of {calibration.engine}"]
    unnamed = "host memory" if metadata.machine.target == "host" else "that its log does not name"
    measured = metadata.machine.gpus[0].name if metadata.machine.gpus else unnamed
    pairs = (
        ("version", wanted.version, metadata.engine.version),
        ("GPU", wanted.gpu, measured),
        ("tensor parallel", wanted.tensor_parallel, vllm.tensor_parallel),
        ("dtype", wanted.dtype, vllm.dtype),
    )
    return [f"{name} {had}, not {want}" for name, want, had in pairs if want is not None and want != had]


def allocate(calibration: Calibration, context: int, concurrency: int, available: tuple[int, ...]) -> Allocation:
    """The start that holds ``concurrency`` sequences of ``context`` tokens at once.

    Args:
        calibration: of the version, GPU and settings that will run.
        context: tokens of each sequence, above zero.
        concurrency: sequences at full length, above zero.
        available: free bytes of each GPU of the instance, before it starts.

    Raises:
        UnknownVerdictError: the calibration does not answer for this (code ``out-of-range``: the context is beyond it).
            OffloadLikelyError: it cannot be had (code ``does-not-fit``), with the largest context that can.
        ValueError: context or concurrency below one.
    """
    if context < 1 or concurrency < 1:
        raise ValueError("context and concurrency must be at least 1")
    sizing = size(calibration, context, concurrency, available)
    if context > calibration.metadata.quality.valid_to:
        raise UnknownVerdictError(_reason(calibration, context, concurrency, sizing), code="out-of-range")
    if sizing.short_bytes:
        largest = sizing.max_context
        raise OffloadLikelyError(
            _reason(calibration, context, concurrency, sizing),
            hint=f"largest context that fits: {largest:,}" if largest else "free memory on the GPU, or take a smaller model",
            code="does-not-fit",
        )
    vllm = sizing.vllm
    utilization = sizing.card.steps(sizing.kv_cache_bytes) / _STEPS
    return Allocation(
        model=vllm.model,
        context=context,
        concurrency=concurrency,
        lever="kv-cache-memory-bytes" if sizing.card.by_bytes else "gpu-memory-utilization",
        utilization=utilization,
        block_size=sizing.kv_blocks.size,
        block_bytes=sizing.kv_blocks.bytes,
        blocks=sizing.blocks,
        spare_blocks=sizing.spare_blocks,
        kv_cache_bytes=sizing.kv_cache_bytes,
        footprint_bytes=sizing.card.footprint,
        required_bytes=sizing.required_bytes,
        margin_bytes=sizing.margin_bytes,
        available_bytes=sizing.card.free,
        max_context=sizing.max_context,
        flags=flags(calibration, vllm, context, utilization, sizing.kv_cache_bytes if sizing.card.by_bytes else None),
    )


def size(calibration: Calibration, context: int, concurrency: int, available: tuple[int, ...]) -> Sizing:
    """What ``concurrency`` sequences of ``context`` tokens need on each GPU, whether it is there or not.

    Raises:
        UnknownVerdictError: the calibration does not answer for this.
    """
    blocks, vllm = calibration.metadata.kv_blocks, calibration.metadata.settings.vllm
    if blocks is None or vllm is None:
        raise UnknownVerdictError(f"{calibration.id} is not a vLLM calibration", hint="harness calibrate MODEL --engine vllm")
    if concurrency > vllm.max_num_seqs:
        raise UnknownVerdictError(
            f"calibrated for at most {counted(vllm.max_num_seqs, 'sequence')} at once, not for {concurrency}",
            hint=f"harness calibrate MODEL --engine vllm --num-parallel {concurrency}",
        )
    card = _card(calibration, vllm, available)
    needed = concurrency * blocks.of_sequence(context) + NULL_BLOCKS
    spare = _spare(blocks, needed)
    kv = (needed + spare) * blocks.bytes
    room = card.room()
    if is_bound(calibration, context) and kv > room >= _least(calibration, blocks, context, concurrency):
        most = f"{format_size(kv)} of KV cache"
        if calibration.metadata.of_one_length:
            most = f"the {most} of {blocks.size:,}"
        raise UnknownVerdictError(
            f"{context:,} tokens take at most {most}, which do not fit, and the log does not say how much less",
            hint="import a log with VLLM_LOGGING_LEVEL=DEBUG, or of a start with this length",
            code="may-fit",
        )
    return Sizing(
        vllm=vllm,
        kv_blocks=blocks,
        card=card,
        blocks=needed,
        spare_blocks=spare,
        kv_cache_bytes=kv,
        required_bytes=card.footprint + kv,
        margin_bytes=card.margin if card.by_bytes else JITTER,
        short_bytes=max(kv - room, 0),
        max_context=_largest(calibration, blocks, concurrency, card),
        bounded=calibration.metadata.bounded,
    )


def flags(calibration: Calibration, vllm: VllmSettings, context: int, utilization: float, kv: int | None) -> tuple[str, ...]:
    """The options of ``vllm serve``: the memory's, and the settings under which it was measured."""
    settings = calibration.metadata.settings
    words = ["--max-model-len", str(context), "--max-num-seqs", str(vllm.max_num_seqs)]
    if kv is not None:
        words += ["--kv-cache-memory-bytes", str(kv)]
    words += ["--gpu-memory-utilization", f"{utilization:.4f}"]
    given = " ".join(vllm.arguments)
    for option, value in (
        ("--max-num-batched-tokens", vllm.max_num_batched_tokens),
        ("--tensor-parallel-size", vllm.tensor_parallel if vllm.tensor_parallel > 1 else None),
        ("--pipeline-parallel-size", vllm.pipeline_parallel if vllm.pipeline_parallel > 1 else None),
        ("--dtype", vllm.dtype),
        ("--kv-cache-dtype", settings.kv_cache_type if settings.kv_cache_type not in ("auto", vllm.dtype) else None),
    ):
        if value is not None and option not in given:
            words += [option, str(value)]
    if vllm.enforce_eager and "--enforce-eager" not in given:
        words.append("--enforce-eager")
    return (*words, *vllm.arguments)


def _card(calibration: Calibration, vllm: VllmSettings, available: tuple[int, ...]) -> _Card:
    metadata = calibration.metadata
    version = metadata.engine.version
    by_bytes = at_least(version, KV_BYTES)
    gpus = vllm.tensor_parallel * vllm.pipeline_parallel
    if metadata.machine.target == "gpu" and len(available) != gpus:
        raise UnknownVerdictError(f"the instance takes {gpus} GPUs, and the free memory of {len(available)} is known")
    breakdown = metadata.breakdown_gb
    if not by_bytes and (metadata.machine.total_cuda_gb is None or breakdown.budget is None):
        raise UnknownVerdictError(
            f"vLLM {version} is sized by its utilisation, and the calibration does not hold the GPU's total"
        )
    # A driver counts a little more than torch does; by bytes this only makes the utilisation smaller, which is safe.
    total = metadata.machine.total_cuda_gb or max((gpu.memory_gb or 0.0 for gpu in metadata.machine.gpus), default=0.0)
    if not total:
        raise UnknownVerdictError("the calibration does not hold the GPU's total")
    return _Card(
        total=from_gib(total),
        free=min(available),
        footprint=from_gib(calibration.constants.base_vram_gb - (breakdown.fixed_cache or 0.0)),
        budget=None if breakdown.budget is None else from_gib(breakdown.budget),
        by_bytes=by_bytes,
        graphs_on_top=not at_least(version, GRAPHS_IN_BUDGET),
    )


def _least(calibration: Calibration, blocks: KvBlocks, context: int, concurrency: int) -> int:
    """What sequences take at least where their cache is known as a bound: their share of the full length; bytes."""
    full = calibration.metadata.quality.valid_to
    needed = concurrency * blocks.of_sequence(full) + NULL_BLOCKS
    share = (needed + _spare(blocks, needed)) * blocks.bytes * context // full
    return round(share / (1 + LINE_ABOVE) / (1 + HYBRID_SPARE)) if blocks.bound else share


def _spare(blocks: KvBlocks, needed: int) -> int:
    hybrid = blocks.fixed > 0 or blocks.per_block > 1
    return 1 + (-(-needed * round(100 * HYBRID_SPARE) // 100) if hybrid else 0)


def _largest(calibration: Calibration, blocks: KvBlocks, concurrency: int, card: _Card) -> int:
    room = card.room() // blocks.bytes
    low, high = 0, max(room, 0)  # the most needed blocks that fit together with their spare ones
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle + _spare(blocks, middle) <= room else (low, middle - 1)
    each = (low - NULL_BLOCKS) // concurrency
    tokens = (each - blocks.fixed) // blocks.per_block * blocks.size
    return min(max(tokens, 0), calibration.metadata.quality.valid_to)


def _reason(calibration: Calibration, context: int, concurrency: int, sizing: Sizing) -> str:
    if (beyond := beyond_range(calibration, context)) is not None:
        return beyond
    card = sizing.card
    sequences = f"{concurrency} sequences" if concurrency > 1 else "one sequence"
    verb = "need" if concurrency > 1 else "needs"
    rest = card.footprint if card.by_bytes else (card.budget or 0)
    return (
        f"{sequences} of {context:,} tokens {verb} {format_size(sizing.kv_cache_bytes)} of KV cache beside {format_size(rest)} "
        f"and a margin of {format_size(sizing.margin_bytes)}, and {format_size(card.free)} are free"
    )
