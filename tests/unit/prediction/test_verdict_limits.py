"""Both sides of every limit of verdicts, of the placement of layers, and of an allocation for vLLM."""

from __future__ import annotations

import msgspec
import pytest

from harness.engines.vllm.allocation import allocate
from harness.model.calibration import Calibration, KvBlocks, Placement
from harness.prediction.memory import predict
from harness.prediction.placement import Compute, plan_dry_runs
from harness.units import GIB, MIB, from_gib, gib
from tests.support.calibrations import made_up
from tests.support.records import WEIGHTS
from tests.support.rules import judge, judge_together, largest_context, layers_of, place, rule_of
from tests.support.vllm_artifacts import vllm_calibration


def with_placement(**changes: object) -> Calibration:
    made = made_up()
    placement: Placement = msgspec.structs.replace(made.metadata.placement, **changes)
    return msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, placement=placement))


def needed(calibration: Calibration, context: int) -> int:
    """Free memory that is just enough, bytes."""
    return predict(calibration, context).total_bytes + rule_of(calibration).reserve_bytes


def test_one_layer_on_the_host_slows_decoding_by_its_share_already() -> None:
    """138 MiB of 4 GiB at a tenth of the speed."""
    calibration = made_up()
    short = judge(calibration, 8192, 1, (needed(calibration, 8192) - 1,))
    share = 138 * MIB / WEIGHTS
    assert short.layers_offloaded == 28
    assert short.decode_tokens_per_s == pytest.approx(1 / ((1 - share) / 60 + share / 6), abs=0.01)
    assert judge(calibration, 8192, 1, (needed(calibration, 8192),)).decode_tokens_per_s == 60.0


def test_the_largest_context_lies_behind_a_step_down_where_memory_falls_there() -> None:
    """Without flash attention memory can fall where a sliding window is full."""
    made = made_up()
    (band,) = made.metadata.bands
    first = msgspec.structs.replace(band, up_to=4096, base_vram_gb=band.base_vram_gb + gib(10 * MIB))
    stepped = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, bands=(first, band)))
    free = needed(stepped, 4352) + predict(stepped, 4352).uncertainty_bytes
    assert free < needed(stepped, 4096) + predict(stepped, 4096).uncertainty_bytes
    assert largest_context(stepped, 1, (free,)) == 4352
    assert largest_context(stepped, 1, (free - 1,)) == 3840


MOE = Placement(
    reserve_gb=1.0,
    layer_weights_gb=gib(28 * 138 * MIB),
    output_weights_gb=gib(WEIGHTS - 28 * 138 * MIB),
    layer_kinds="f" * 28,
    layers_gb=(gib(18 * MIB),) * 28,
    experts_gb=(gib(120 * MIB),) * 28,
    expert_use=0.25,
)


def test_of_the_experts_that_overflow_a_third_or_two_may_still_stay() -> None:
    """llama.cpp's fit moves the up, then the gate projection of the first overflowing layer, each a third of its experts."""
    calibration = made_up()
    calibration = msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, placement=MOE))
    budget, shares = predict(calibration, 8192).total_bytes - 500 * MIB, []
    for room in range(0, 240, 10):
        placed = place(calibration, 8192, 1, budget + room * MIB, None)
        assert placed is not None
        shares.append((placed.overflowing, round(placed.host_share * WEIGHTS / (40 * MIB))))
    thirds: dict[int, set[int]] = {}
    for overflowing, third in shares:
        thirds.setdefault(overflowing, set()).add(third)
    counts = [len(found) for _, found in sorted(thirds.items())[1:-1]]  # both ends are cut off
    assert counts
    assert set(counts) == {3}


@pytest.mark.parametrize("recorded", [None, gib(2 * WEIGHTS)])
def test_layers_of_unknown_size_share_the_weights_with_the_output_part(recorded: float | None) -> None:
    calibration = with_placement(layer_weights_gb=recorded, layers_gb=(), experts_gb=())
    layers = layers_of(calibration, predict(calibration, 8192))
    assert layers is not None
    assert layers.output == pytest.approx(WEIGHTS / 29, abs=2048)
    assert layers.dense == pytest.approx([WEIGHTS / 29] * 28, abs=2048)


def test_dry_runs_split_in_the_middle_and_at_the_last_layer_but_one() -> None:
    """Of 17 layers with the output layer, 2 to 15 are splits; 16 leave a single one on the host."""
    planned = plan_dry_runs(None, 16, (8192, 32768, 131_072), moe=False)
    assert [one.gpu_layers for one in planned] == [9] * 3 + [16] * 3


def test_without_dry_runs_a_split_costs_the_cache_of_one_layer_more() -> None:
    calibration = with_placement(split_compute=())
    prediction = predict(calibration, 8192)
    layers = layers_of(calibration, prediction)
    assert layers is not None
    compute = Compute(calibration.metadata.placement, layers, 8192, 100 * MIB)
    assert compute.split(29) == 100 * MIB
    caches = (prediction.context_cache_bytes or 0) + (prediction.fixed_cache_bytes or 0)
    assert compute.split(28) == pytest.approx(100 * MIB + caches / 28)


def test_a_model_that_fits_takes_what_it_requires_from_the_next() -> None:
    calibration = made_up()
    first, second = judge_together([(calibration, 8192, 1)] * 2, (24 * GIB,))[0]
    assert second.available_bytes == 24 * GIB - (first.required_bytes or 0)


def test_a_model_that_spills_leaves_the_next_its_reserve() -> None:
    calibration = made_up()
    verdicts, fates = judge_together([(calibration, 131_072, 1), (calibration, 8192, 1)], (5 * GIB,))
    assert fates == ["offload", "offload"]
    assert verdicts[1].available_bytes == rule_of(calibration).reserve_bytes


def test_a_model_that_would_take_more_than_there_is_leaves_nothing_below_zero() -> None:
    calibration = made_up()
    third = judge_together([(calibration, 8192, 1)] * 3, (6 * GIB,))[0][2]
    assert third.available_bytes == 1 * GIB


# -- vLLM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "total", "lever", "margin"),
    [
        ("0.10.1", 80 * GIB, "gpu-memory-utilization", round(0.3 * GIB)),
        ("0.10.2", 80 * GIB, "kv-cache-memory-bytes", round(1.6 * GIB)),  # 2 %
        ("0.29.0", 40 * GIB, "kv-cache-memory-bytes", round(0.8 * GIB)),
        ("0.29.0", 7 * GIB, "kv-cache-memory-bytes", round(0.15 * GIB)),  # 2 % would be less
    ],
)
def test_what_stays_free_beside_vllm(version: str, total: int, lever: str, margin: int) -> None:
    weights = total // 8
    calibration = vllm_calibration(version=version, total=total, weights=weights, budget=weights, footprint=weights)
    granted = allocate(calibration, 4096, 1, (total,))
    assert granted.lever == lever
    assert granted.margin_bytes == pytest.approx(margin, abs=64)


def test_the_margin_is_there_or_the_start_is_refused() -> None:
    calibration = vllm_calibration(total=80 * GIB)
    granted = allocate(calibration, 4096, 1, (80 * GIB,))
    enough = granted.required_bytes + granted.margin_bytes
    assert judge(calibration, 4096, 1, (enough,)).verdict == "fits"
    short = judge(calibration, 4096, 1, (enough - 1,))
    assert (short.verdict, short.short_bytes) == ("offload", 1)


@pytest.mark.parametrize(
    ("blocks", "needed_blocks", "spare"),
    [
        (KvBlocks(size=16, bytes=2 * MIB), 257, 1),
        (KvBlocks(size=16, bytes=MIB, per_block=4), 1025, 1 + 21),  # 2 % of a hybrid model's, rounded up
        (KvBlocks(size=16, bytes=MIB, fixed=3), 260, 1 + 6),
    ],
)
def test_blocks_of_a_sequence_the_null_block_and_spare_ones(blocks: KvBlocks, needed_blocks: int, spare: int) -> None:
    granted = allocate(vllm_calibration(blocks=blocks), 4096, 1, (80 * GIB,))
    assert (granted.blocks, granted.spare_blocks) == (needed_blocks, spare)
    assert granted.kv_cache_bytes == (needed_blocks + spare) * blocks.bytes
    assert granted.required_bytes == granted.kv_cache_bytes + from_gib(17.0)
