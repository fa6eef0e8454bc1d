"""Layers that stay on the GPU, against what llama-server b10434 did with the same budget (models of bench/models.py)."""

from __future__ import annotations

import msgspec
import pytest

from harness.model.calibration import Calibration, Placement, SplitCompute
from harness.prediction.memory import predict
from harness.prediction.placement import DRY_RUNS, plan_dry_runs
from harness.units import GIB, MIB
from tests.support.rules import place
from tests.unit.prediction.test_verdict import calibrated

#: qwen3moe, 12 layers of 8 experts, measured at 2 048 to 8 192 tokens; the grid is its six dry runs.
MOE = Placement(
    reserve_gb=1.0,
    layer_weights_gb=0.539349,
    output_weights_gb=0.061039,
    split_compute=(
        SplitCompute(layers=7, context=8192, compute_gb=0.035156),
        SplitCompute(layers=7, context=32768, compute_gb=0.105469),
        SplitCompute(layers=7, context=131072, compute_gb=0.386719),
        SplitCompute(layers=13, context=8192, compute_gb=0.034180, experts_on_host=True),
        SplitCompute(layers=13, context=131072, compute_gb=0.151367, experts_on_host=True),
        SplitCompute(layers=12, context=131072, compute_gb=0.386719),
    ),
    layer_kinds="f" * 12,
    layers_gb=(0.009789,) * 12,
    experts_gb=(0.035156,) * 12,
    expert_use=0.25,
)
#: lfm2, attention in six of sixteen layers.
HYBRID = Placement(
    reserve_gb=1.0,
    layer_weights_gb=0.535338,
    output_weights_gb=0.061035,
    split_compute=(
        SplitCompute(layers=9, context=8192, compute_gb=0.040039),
        SplitCompute(layers=9, context=32768, compute_gb=0.063477),
        SplitCompute(layers=9, context=131072, compute_gb=0.157227),
        SplitCompute(layers=8, context=8192, compute_gb=0.032227),
        SplitCompute(layers=8, context=32768, compute_gb=0.068359),
        SplitCompute(layers=8, context=131072, compute_gb=0.255859),
    ),
    layer_kinds="rrfrrfrrfrfrfrfr",
    layers_gb=tuple(0.032235 if kind == "f" else 0.034193 for kind in "rrfrrfrrfrfrfrfr"),
)


def model(placement: Placement, layers: int, weights: float, compute: float, kv: float, fixed: float = 0.0) -> Calibration:
    """A calibration with one band, without overhead."""
    made = calibrated()
    band = msgspec.structs.replace(
        made.metadata.bands[0],
        base_vram_gb=weights + compute + fixed,
        kv_cache_gb_per_10k=kv,
        compute_gb_per_10k=0.009537,
        fixed_cache_gb=fixed,
    )
    parts = msgspec.structs.replace(
        made.metadata.breakdown_gb, weights=weights, compute=compute, fixed_cache=fixed, overhead=None
    )
    named = msgspec.structs.replace(made.metadata.model, layers=layers)
    metadata = msgspec.structs.replace(made.metadata, placement=placement, bands=(band,), breakdown_gb=parts, model=named)
    return msgspec.structs.replace(made, metadata=metadata)


@pytest.mark.parametrize(
    ("context", "budget", "layers", "overflowing"),
    [
        (4096, 729, 13, 2),
        (4096, 696, 13, 3),
        (4096, 512, 13, 8),
        (4096, 366, 13, 12),
        (4096, 219, 5, 4),
        (16384, 877, 13, 6),
        (16384, 516, 9, 8),
        (65536, 1897, 13, 11),
        (65536, 669, 3, 2),
    ],
)
def test_experts_leave_before_layers_do(context: int, budget: int, layers: int, overflowing: int) -> None:
    placed = place(model(MOE, 12, 0.600391, 0.017588, 0.228882), context, 1, budget * MIB, None)
    assert placed is not None
    assert (placed.offloaded, placed.overflowing) == (layers, overflowing)


@pytest.mark.parametrize(
    ("context", "budget", "layers"),
    [(4096, 696, 16), (4096, 489, 11), (16384, 727, 14), (16384, 256, 4), (65536, 1405, 14), (65536, 739, 6), (65536, 221, 1)],
)
def test_a_split_of_a_hybrid_costs_what_its_last_host_layer_is(context: int, budget: int, layers: int) -> None:
    placed = place(model(HYBRID, 16, 0.596377, 0.036162, 0.114441, 0.000078), context, 1, budget * MIB, None)
    assert placed is not None
    assert placed.offloaded == layers


def test_what_a_token_reads_weighs_experts_by_their_use() -> None:
    calibration = model(MOE, 12, 0.600391, 0.017588, 0.228882)
    placed = place(calibration, 4096, 1, 366 * MIB, None)
    assert placed is not None
    assert placed.host_share == pytest.approx(11 * 0.035156 / 0.600391, abs=0.03)
    assert placed.host_work == pytest.approx(11 * 0.035156 * 0.25 / (0.600391 - 12 * 0.035156 * 0.75), abs=0.02)


def test_more_memory_never_keeps_fewer_weights_of_a_dense_model() -> None:
    calibration = calibrated()
    need = predict(calibration, 65536).total_bytes
    kept = [
        placed.offloaded
        for part in range(1, 20)
        if (placed := place(calibration, 65536, 1, need * part // 20, None)) is not None
    ]
    assert kept == sorted(kept)
    assert kept[0] < 3
    assert kept[-1] >= 26


def test_without_layers_nothing_is_said() -> None:
    unnamed = model(Placement(reserve_gb=1.0, layer_weights_gb=None, output_weights_gb=None), 0, 4.0, 0.1, 0.1)
    assert place(unnamed, 8192, 1, GIB, None) is None


@pytest.mark.parametrize("kinds", [None, "f" * 24, "wwwwwf" * 4, "rrf" * 8])
@pytest.mark.parametrize("moe", [False, True])
def test_dry_runs_are_few_and_within_the_model(kinds: str | None, moe: bool) -> None:
    planned = plan_dry_runs(kinds, 24, (2048, 8192, 32768), moe=moe)
    assert 3 <= len(planned) <= DRY_RUNS
    assert len(set(planned)) == len(planned)
    assert all(request.gpu_layers is not None and 1 <= request.gpu_layers <= 25 for request in planned)
    assert any(request.experts_on_host for request in planned) == moe
    assert plan_dry_runs(kinds, 1, (256,), moe=moe)
