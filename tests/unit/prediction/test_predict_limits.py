"""Both sides of every limit of a prediction and of the engines' own rules: batch, reserve, eviction."""

from __future__ import annotations

import msgspec
import pytest

from harness.model.calibration import Calibration, DepthSpeed
from harness.model.record import EngineVersion, Gpu
from harness.prediction.memory import decode_at_depth, predict, predict_speed
from harness.units import GIB, MIB, gib
from tests.support.calibrations import made_up
from tests.support.rules import batch_of, evicts_others, ollama_estimate, rule_of


def of_ollama(version: str = "0.33.0", base_gb: float = 4.0, gpus: int = 1) -> Calibration:
    """With a band for each batch that Ollama chooses; it reckons ``base_gb`` and 32 KiB a token."""
    made = made_up()
    (band,) = made.metadata.bands
    metadata = msgspec.structs.replace(
        made.metadata,
        engine=EngineVersion(version=version),
        machine=msgspec.structs.replace(made.metadata.machine, gpus=(Gpu(name="Test A"),) * gpus),
        bands=tuple(
            msgspec.structs.replace(band, up_to=up_to, num_batch=batch)
            for up_to, batch in ((4096, 512), (32768, 1024), (131072, 2048))
        ),
        placement=msgspec.structs.replace(
            made.metadata.placement, estimate_base_gb=base_gb, estimate_gb_per_10k=gib(32768 * 10_000)
        ),
    )
    return msgspec.structs.replace(made, engine="ollama", id="ollama/made-up", metadata=metadata)


def least(size: int, percent: int) -> int:
    """The least free memory of which ``percent`` hold ``size``, bytes."""
    return -(-size * 100 // percent)


def test_without_flash_attention_compute_does_not_shrink_below_1024_tokens() -> None:
    """A batch's activations are more there than its scores: on the line qwen2 0.5B lacks 13 MiB at 512 tokens."""
    made = made_up()
    settings = msgspec.structs.replace(made.metadata.settings, flash_attention="disabled")
    plain = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, settings=settings))
    parts = {context: predict(plain, context).compute_bytes or 0 for context in (512, 1024, 1280)}
    assert parts[512] == parts[1024] < parts[1280]
    flash = msgspec.structs.replace(made.metadata.settings, flash_attention="enabled")
    fast = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, settings=flash))
    assert (predict(fast, 512).compute_bytes or 0) < (predict(fast, 1024).compute_bytes or 0)


def test_below_the_physical_batch_a_prediction_is_an_upper_bound() -> None:
    """Contexts are padded to 256 cells: 257 tokens fill a batch of 512."""
    said = {context: any("upper bound" in text for text in predict(made_up(), context).warnings) for context in (1, 256, 257)}
    assert said == {1: True, 256: True, 257: False}


def test_the_calibrated_range_ends_behind_its_last_token() -> None:
    assert predict(made_up(), 131_072).within_range
    assert not predict(made_up(), 131_073).within_range


def with_performance(**changes: object) -> Calibration:
    made = made_up()
    performance = msgspec.structs.replace(made.metadata.performance, **changes)
    return msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, performance=performance))


@pytest.mark.parametrize(("depth", "rate"), [(1500, 33.33), (1000, 50.0), (750, 66.67), (500, 100.0), (0, 100.0)])
def test_a_shallower_cache_is_at_most_twice_as_fast_as_the_first_depth_measured(depth: int, rate: float) -> None:
    """20 ms a token at 1 000 tokens and 40 ms at 2 000: the line would end at nothing."""
    depths = tuple(DepthSpeed(depth=at, decode_tokens_per_s=speed) for at, speed in ((1000, 50.0), (2000, 25.0)))
    assert decode_at_depth(with_performance(depths=depths), depth) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize(("spread", "uncertainty"), [(None, 0.15), (0.07, 0.15), (0.075, 0.15), (0.1, 0.2)])
def test_a_speed_is_good_to_twice_the_spread_of_its_repeats_and_to_15_percent_at_best(
    spread: float | None, uncertainty: float
) -> None:
    assert predict_speed(with_performance(spread=spread), 1000).uncertainty == pytest.approx(uncertainty)


@pytest.mark.parametrize(
    ("version", "go_runner", "estimates"),
    [("0.12.10", True, True), ("0.12.11", True, False), ("0.29.9", True, False), ("0.30.0", False, False)],
)
def test_the_rule_of_placement_goes_with_ollamas_version(version: str, go_runner: bool, estimates: bool) -> None:
    rule = rule_of(of_ollama(version))
    assert (rule.go_runner, rule.estimates) == (go_runner, estimates)


def test_ollamas_go_runner_sets_457_mebibytes_aside_for_the_driver() -> None:
    """Of which 300 are in the calibration's overhead."""
    assert rule_of(of_ollama("0.20.2")).reserve_bytes == pytest.approx(157 * MIB, abs=2048)


@pytest.mark.parametrize(("context", "batch"), [(4096, 512), (4097, 1024), (32768, 1024), (32769, 2048)])
def test_ollama_chooses_the_batch_by_the_context(context: int, batch: int) -> None:
    assert batch_of(of_ollama(), context, 1, None) == batch


@pytest.mark.parametrize(
    ("context", "base_gb", "percent", "extra", "batches"),
    [
        (131_072, 4.0, 60, 0, (1024, 2048)),  # 8 GiB: 60 % decide
        (40_960, 4.0, 80, 2 * GIB, (1024, 2048)),  # 5.25 GiB and the batch's 2 GiB in 80 %
        (32_768, 12.0, 75, 0, (512, 1024)),  # 13 GiB: 75 % decide
        (8192, 4.0, 80, 768 * MIB, (512, 1024)),  # 4.25 GiB and the batch's 768 MiB in 80 %
    ],
)
def test_ollama_takes_a_batch_as_soon_as_its_estimate_allows_it(
    context: int, base_gb: float, percent: int, extra: int, batches: tuple[int, int]
) -> None:
    calibration = of_ollama(base_gb=base_gb)
    enough = least(ollama_estimate(calibration, context) + extra, percent)
    assert tuple(batch_of(calibration, context, 1, free) for free in (enough - 1, enough)) == batches


def test_ollama_evicts_where_its_estimate_is_above_80_percent_of_what_is_free() -> None:
    calibration = of_ollama()
    enough = least(ollama_estimate(calibration, 4096), 80)
    assert not evicts_others(calibration, 4096, 1, (enough,), 1)
    assert evicts_others(calibration, 4096, 1, (enough - 1,), 1)


@pytest.mark.parametrize("gpus", [1, 2])
def test_ollama_keeps_three_models_on_each_gpu(gpus: int) -> None:
    calibration = of_ollama(gpus=gpus)
    assert [evicts_others(calibration, 4096, 1, (800 * GIB,) * gpus, loaded) for loaded in (3 * gpus - 1, 3 * gpus)] == [
        False,
        True,
    ]


def test_more_slots_may_hold_copies_of_recurrent_state() -> None:
    """qwen3next, b11434: 5.0 MiB of compute for three more slots of 4.7 MiB, which was outside the interval."""
    made = made_up()
    state = msgspec.structs.replace(made.metadata.bands[0], fixed_cache_gb=4.7 / 1024, recurrent_gb=4.7 / 1024)
    window = msgspec.structs.replace(state, recurrent_gb=None)
    bounds = []
    for band in (state, window):
        one = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, bands=(band,)))
        bounds.append([predict(one, 8192, slots).uncertainty_bytes for slots in (1, 4)])
    assert bounds[0][0] == bounds[1][0]
    assert bounds[0][1] - bounds[1][1] == pytest.approx(3 * 4.7 * MIB, abs=MIB / 10)
