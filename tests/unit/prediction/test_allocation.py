"""The allocator against a simulation of vLLM's own admission check, on machines and models of any size."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.engines.vllm.allocation import JITTER, MARGIN, allocate, mismatches, size
from harness.errors import OffloadLikelyError, UnknownVerdictError
from harness.model.calibration import Calibration, KvBlocks
from harness.model.record import VllmSettings
from harness.prediction.allocation import Allocation, Deployment
from harness.text import at_least
from harness.units import GIB, MIB, from_gib
from tests.support.vllm_artifacts import vllm_calibration

VERSIONS = ("0.6.6", "0.8.5.post1", "0.10.1.1", "0.10.2", "0.11.2", "0.19.1", "0.20.0", "0.27.1", "0.29.0", "0.33.0")


class Machine:
    """vLLM as it starts, by its own source, 0.9 to 0.33.

    ``request_memory`` (vllm/v1/worker/utils.py), ``determine_available_memory`` (vllm/v1/worker/gpu_worker.py) and
    ``check_enough_kv_cache_memory`` (vllm/v1/core/kv_cache_utils.py).

    ``drift`` is by how much profiling comes out above the calibration this time.
    """

    def __init__(self, calibration: Calibration, free: int, drift: int = 0) -> None:
        metadata = calibration.metadata
        assert metadata.kv_blocks is not None
        assert metadata.breakdown_gb.budget is not None
        self.version, self.blocks = metadata.engine.version, metadata.kv_blocks
        self.total, self.free = from_gib(metadata.machine.total_cuda_gb or 0), free
        self.budget = from_gib(metadata.breakdown_gb.budget) + drift
        self.footprint = from_gib(calibration.constants.base_vram_gb - (metadata.breakdown_gb.fixed_cache or 0.0)) + drift

    def refuses(self, utilization: float | Fraction, kv: int | None, context: int, sequences: int = 1) -> str | None:
        """Why a start fails, or cannot hold ``sequences`` at full length; ``None`` if all is well."""
        requested = math.ceil(self.total * utilization)
        if requested > self.free:
            return "free memory is less than the utilization asked for"
        available = requested - self.budget if kv is None else kv
        number = available // self.blocks.bytes
        if number <= 0:
            return "no available memory for the cache blocks"
        checked = number - 1 if at_least(self.version, (0, 29, 0)) else number
        if self.blocks.of_sequence(context) > checked:
            return "the KV cache is too small for one sequence"
        if self.footprint + number * self.blocks.bytes > self.free:
            return "out of memory"
        if sequences * self.blocks.of_sequence(context) > number - 1:  # block 0 is never handed out, in every release
            return "the sequences do not fit at once"
        return None


def option(allocation: Allocation, name: str) -> str | None:
    flags = allocation.flags
    return flags[flags.index(name) + 1] if name in flags else None


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    version = draw(st.sampled_from(VERSIONS))
    total = draw(st.integers(4 * GIB, 192 * GIB))
    weights = draw(st.integers(200 * MIB, total))
    budget = weights + draw(st.integers(0, 6 * GIB))
    graphs = draw(st.integers(0, 3 * GIB))
    # From 0.20 on the budget holds an estimate of the graphs, which may be above or below what they take.
    footprint = budget + (draw(st.integers(-MIB * 500, MIB * 500)) if at_least(version, (0, 20, 0)) else graphs)
    blocks = KvBlocks(
        size=draw(st.sampled_from((16, 32, 128, 544))),
        bytes=draw(st.integers(1, 8192)) * 4096,
        per_block=draw(st.sampled_from((1, 1, 1, 4))),
        fixed=draw(st.sampled_from((0, 0, 0, 3, 65))),
    )
    return vllm_calibration(
        version=version,
        total=total,
        weights=weights,
        budget=budget,
        footprint=max(footprint, weights),
        blocks=blocks,
        valid_to=draw(st.sampled_from((4096, 32768, 131072, 1048576))),
    )


@settings(max_examples=150, deadline=None)
@given(calibrations(), st.integers(1, 1 << 20), st.integers(1, 64), st.floats(0.2, 1.0), st.floats(0, 1))
def test_the_flags_are_admitted_and_one_block_less_is_not(
    calibration: Calibration, context: int, sequences: int, share: float, drift: float
) -> None:
    free = int(from_gib(calibration.metadata.machine.total_cuda_gb or 0) * share)
    try:
        granted = allocate(calibration, context, sequences, (free,))
    except (OffloadLikelyError, UnknownVerdictError):
        largest = size(calibration, 1, sequences, (free,)).max_context
        assert largest < context
        assume(largest > 0)
        context = largest
        granted = allocate(calibration, context, sequences, (free,))
    utilization = float(option(granted, "--gpu-memory-utilization") or "nan")
    given_bytes = option(granted, "--kv-cache-memory-bytes")
    by_bytes = granted.lever == "kv-cache-memory-bytes"
    assert (given_bytes is not None) == by_bytes == at_least(calibration.metadata.engine.version, (0, 10, 2))
    drifted = Machine(calibration, free, round(drift * (MARGIN if by_bytes else JITTER)))
    assert drifted.refuses(utilization, int(given_bytes) if given_bytes else None, context, sequences) is None
    # Without its spare blocks it still holds; with one block less it does not, by either lever.
    exact = Machine(calibration, 1 << 60)
    needed = granted.blocks * granted.block_bytes
    for cache, fits in ((needed, True), (needed - granted.block_bytes, False), (needed - 1, False)):
        by_share = Fraction(exact.budget + cache, exact.total)  # the utilisation that leaves exactly this much
        refused = exact.refuses(0, cache, context, sequences) if by_bytes else exact.refuses(by_share, None, context, sequences)
        assert (refused is None) == fits


@settings(max_examples=80, deadline=None)
@given(calibrations(), st.integers(1, 64), st.floats(0.2, 1.0))
def test_the_largest_context_is_granted_and_one_block_more_is_not(
    calibration: Calibration, sequences: int, share: float
) -> None:
    free = int(from_gib(calibration.metadata.machine.total_cuda_gb or 0) * share)
    largest = size(calibration, 1, sequences, (free,)).max_context
    if largest:
        assert allocate(calibration, largest, sequences, (free,)).max_context == largest
    assert calibration.metadata.kv_blocks is not None
    beyond = largest + calibration.metadata.kv_blocks.size
    with pytest.raises((OffloadLikelyError, UnknownVerdictError)) as refused:
        allocate(calibration, beyond, sequences, (free,))
    outside = beyond > calibration.metadata.quality.valid_to
    assert (refused.value.exit_code, refused.value.code) == ((4, "out-of-range") if outside else (3, "does-not-fit"))


def test_from_0_29_on_one_block_less_is_refused_at_the_start() -> None:
    calibration = vllm_calibration(version="0.29.0")
    granted = allocate(calibration, 4096, 1, (70 * GIB,))
    machine = Machine(calibration, 70 * GIB)
    assert granted.blocks == 4096 // 16 + 1
    assert machine.refuses(0.1, granted.blocks * granted.block_bytes, 4096) is None
    assert (
        machine.refuses(0.1, (granted.blocks - 1) * granted.block_bytes, 4096) == "the KV cache is too small for one sequence"
    )


def test_a_refusal_says_why_and_what_would_fit() -> None:
    with pytest.raises(OffloadLikelyError) as refused:
        allocate(vllm_calibration(), 131072, 4, (24 * GIB,))
    assert "4 sequences of 131,072 tokens need 64.00 GiB" in refused.value.message
    assert refused.value.hint == "largest context that fits: 11,040"


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UnknownVerdictError, match="beyond 131,072"):
        allocate(vllm_calibration(), 131073, 1, (80 * GIB,))


def test_more_sequences_than_measured_or_another_number_of_gpus_are_unknown() -> None:
    with pytest.raises(UnknownVerdictError, match="at most 64 sequences"):
        allocate(vllm_calibration(), 1024, 65, (80 * GIB,))
    with pytest.raises(UnknownVerdictError, match="takes 2 GPU"):
        allocate(vllm_calibration(tensor_parallel=2), 1024, 1, (80 * GIB,))


def test_several_gpus_are_sized_by_the_fullest() -> None:
    assert allocate(vllm_calibration(tensor_parallel=2), 1024, 1, (80 * GIB, 30 * GIB)).available_bytes == 30 * GIB


def test_the_settings_that_were_measured_are_among_the_flags_once() -> None:
    words = allocate(vllm_calibration(tensor_parallel=2, arguments=("--dtype", "float16")), 1024, 1, (80 * GIB,) * 2).flags
    assert words[-2:] == ("--dtype", "float16")
    assert words.count("--dtype") == 1
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[words.index("--max-num-batched-tokens") + 1] == "2048"


def test_what_differs_from_the_calibration_is_said() -> None:
    wanted = Deployment(version="0.30.0", gpu="Acme T2", tensor_parallel=2, dtype="float16")
    assert mismatches(vllm_calibration(), wanted) == [
        "version 0.29.0, not 0.30.0",
        "GPU Acme T1, not Acme T2",
        "tensor parallel 1, not 2",
        "dtype bfloat16, not float16",
    ]
    assert mismatches(vllm_calibration(), Deployment()) == []


def test_an_older_release_without_the_gpus_total_is_unknown() -> None:
    import msgspec

    calibration = vllm_calibration(version="0.9.2")
    metadata = calibration.metadata
    machine = msgspec.structs.replace(metadata.machine, total_cuda_gb=None)
    calibration = msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(metadata, machine=machine))
    with pytest.raises(UnknownVerdictError, match="does not hold the GPU's total"):
        allocate(calibration, 1024, 1, (80 * GIB,))
    assert isinstance(metadata.settings.vllm, VllmSettings)
