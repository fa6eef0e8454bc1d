"""Constants follow from loads, and untrustworthy runs are refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UntrustedError
from harness.fit.constants import fit_record
from harness.model.facts import DeviceFacts
from harness.model.record import EngineVersion, Load
from harness.model.validation import from_document
from harness.prediction.memory import predict
from harness.units import GIB, MIB
from tests.support.records import (
    COMPUTE_START,
    KV_PER_TOKEN,
    OVERHEAD,
    WEIGHTS,
    WINDOW,
    facts,
    load,
    record,
)


def truth(context: int, batch: int = 512, parallel: int = 1) -> int:
    return (
        WEIGHTS + OVERHEAD + COMPUTE_START * batch // 512 + 2 * batch * context + parallel * (WINDOW + KV_PER_TOKEN * context)
    )


def test_three_loads_give_the_constants_that_made_them() -> None:
    calibration = fit_record(record(load(8192), load(16384), load(32768)))
    constants = calibration.constants
    assert constants.kv_cache_gb_per_10k == pytest.approx(KV_PER_TOKEN * 10_000 / GIB, abs=1e-6)
    assert constants.compute_gb_per_10k == pytest.approx(1024 * 10_000 / GIB, abs=1e-6)
    assert constants.base_vram_gb == pytest.approx((WEIGHTS + OVERHEAD + WINDOW + COMPUTE_START) / GIB, abs=4e-6)
    assert calibration.metadata.breakdown_gb.fixed_cache == pytest.approx(WINDOW / GIB, abs=1e-6)
    assert calibration.metadata.quality.max_error == 0.0


def test_the_parts_of_base_sum_to_it_exactly() -> None:
    calibration = fit_record(record(load(8192), load(16384), load(32768)))
    parts = calibration.metadata.breakdown_gb
    assert round((parts.weights or 0) + (parts.fixed_cache or 0) + (parts.compute or 0) + (parts.overhead or 0), 6) == (
        calibration.constants.base_vram_gb
    )


@given(context=st.integers(1, 131072), parallel=st.integers(1, 8))
def test_a_prediction_is_the_truth_at_contexts_and_slots_never_loaded(context: int, parallel: int) -> None:
    calibration = fit_record(record(load(8192), load(16384), load(32768)))
    prediction = predict(calibration, context, parallel)
    padded = -(-context // 256) * 256
    assert prediction.total_bytes == pytest.approx(truth(padded, parallel=parallel), rel=2e-4)
    parts = (
        prediction.weights_bytes,
        prediction.fixed_cache_bytes,
        prediction.context_cache_bytes,
        prediction.compute_bytes,
        prediction.overhead_bytes or 0,
    )
    assert sum(part or 0 for part in parts) == prediction.total_bytes


def test_bands_of_one_load_take_their_slopes_from_the_band_with_three() -> None:
    limits = ((4096, 512), (32768, 1024), (1 << 31, 2048))
    loads = [load(4096, 512), load(16384, 1024), *(load(context, 2048) for context in (8192, 16384, 32768))]
    calibration = fit_record(record(*loads, limits=limits))
    assert [(band.up_to, band.num_batch) for band in calibration.metadata.bands] == [
        (4096, 512),
        (32768, 1024),
        (131072, 2048),
    ]
    for context, batch in ((2048, 512), (4096, 512), (8192, 1024), (32768, 1024), (65536, 2048), (131072, 2048)):
        assert predict(calibration, context).total_bytes == pytest.approx(truth(context, batch), rel=1e-4)


def test_an_overhead_that_moves_is_refused() -> None:
    with pytest.raises(UntrustedError, match="beyond the log") as caught:
        fit_record(record(load(8192), load(16384, overhead=OVERHEAD + 80 * MIB), load(32768)))
    assert caught.value.exit_code == 5


def test_memory_that_bends_is_refused() -> None:
    def bent(context: int, kv: int) -> object:
        seen = facts(context)
        cuda = msgspec.structs.replace(seen.devices["CUDA0"], kv_cache_bytes=kv)
        return load(context, devices={"CUDA0": cuda})

    with pytest.raises(UntrustedError, match="straight line"):
        fit_record(record(bent(8192, 1 * GIB), bent(16384, 2 * GIB), bent(32768, 9 * GIB)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_offloaded": 21},
        {"layers_offloaded": 28},
        {"layers_overflowing": 7},
        {"complete": False},
        {"estimated": True},
        {
            "devices": {
                "CUDA0": DeviceFacts(kind="gpu", weights_bytes=WEIGHTS, kv_cache_bytes=MIB, compute_bytes=MIB),
                "CPU": DeviceFacts(kind="host", kv_cache_bytes=MIB),
            }
        },
        {"devices": {"CPU": DeviceFacts(kind="host", weights_bytes=WEIGHTS, kv_cache_bytes=MIB)}},
    ],
)
def test_a_load_that_spilled_is_never_a_point(changes: dict[str, object]) -> None:
    spilled = load(32768, **changes)  # type: ignore[arg-type]
    calibration = fit_record(record(load(4096), load(8192), load(16384), spilled))
    assert [point.context for point in calibration.metadata.quality.loads] == [4096, 8192, 16384]
    assert any(note.startswith("context 32,768: not a point") for note in calibration.metadata.quality.notes)


def test_with_two_loads_the_error_is_unknown_and_a_note_says_so() -> None:
    calibration = fit_record(record(load(8192), load(16384)))
    assert calibration.metadata.quality.max_error is None
    assert any("max_error was not measured" in note for note in calibration.metadata.quality.notes)


def test_one_load_is_refused() -> None:
    with pytest.raises(UntrustedError, match="two contexts"):
        fit_record(record(load(8192)))


def test_loads_with_different_cache_types_are_refused() -> None:
    with pytest.raises(UntrustedError, match="kv_cache_type"):
        fit_record(record(load(8192), load(16384, kv_cache_type="q8_0"), load(32768)))


def test_logged_memory_has_no_overhead_and_says_so() -> None:
    run = record(load(8192), load(16384), load(32768))
    logged = msgspec.structs.replace(run, machine=msgspec.structs.replace(run.machine, meter="log"))
    calibration = fit_record(logged)
    assert calibration.metadata.breakdown_gb.overhead is None
    prediction = predict(calibration, 8192)
    assert prediction.overhead_bytes is None
    assert any("logged, not measured" in text for text in prediction.warnings)


def test_beyond_the_range_a_prediction_is_marked() -> None:
    calibration = fit_record(record(load(8192), load(16384), load(32768), train=40960))
    assert predict(calibration, 40960).within_range
    assert not predict(calibration, 40961).within_range


def test_slots_multiply_the_caches_and_nothing_else() -> None:
    calibration = fit_record(record(load(8192), load(16384), load(32768)))
    one, four = predict(calibration, 16384), predict(calibration, 16384, 4)
    assert four.context_cache_bytes == pytest.approx(4 * (one.context_cache_bytes or 0), abs=4)
    assert four.fixed_cache_bytes == pytest.approx(4 * (one.fixed_cache_bytes or 0), abs=4)
    assert four.weights_bytes == one.weights_bytes
    assert four.compute_bytes == one.compute_bytes
    assert four.overhead_bytes == one.overhead_bytes


def test_loads_of_several_slots_give_the_constants_of_one() -> None:
    one = fit_record(record(load(8192), load(16384), load(32768))).constants
    four = fit_record(record(*(load(context, parallel=4) for context in (8192, 16384, 32768)))).constants
    assert four.kv_cache_gb_per_10k == pytest.approx(one.kv_cache_gb_per_10k, abs=1e-6)
    assert four.base_vram_gb == pytest.approx(one.base_vram_gb, abs=4e-6)


def test_different_types_of_keys_and_values_reach_the_settings() -> None:
    loads = (load(context, kv_cache_type="q8_0/f16") for context in (8192, 16384, 32768))
    assert fit_record(record(*loads)).metadata.settings.kv_cache_type == "q8_0/f16"


def test_a_reading_that_failed_is_not_zero() -> None:
    blind = [msgspec.structs.replace(load(context), idle=None, busy=None) for context in (8192, 16384)]
    with pytest.raises(UntrustedError, match="nothing to fit"):
        fit_record(record(*blind))


def test_only_spilled_loads_are_nothing_to_fit() -> None:
    with pytest.raises(UntrustedError, match="nothing to fit"):
        fit_record(record(*(load(context, layers_offloaded=3) for context in (8192, 16384, 32768))))


def growing(context: int, per_token: int) -> object:
    """A load whose memory grows by so much a token more than its log says."""
    return load(context, overhead=OVERHEAD + per_token * context)


@pytest.mark.parametrize("per_token", [48, 480, 6000])
def test_totals_on_a_straight_line_are_a_line_where_the_log_grows_more_slowly(per_token: int) -> None:
    contexts = (8192, 65536, 131072) if per_token == 48 else (8192, 16384, 32768)
    calibration = fit_record(record(*(growing(one, per_token) for one in contexts)))  # type: ignore[arg-type]
    band = calibration.metadata.bands[-1]
    assert band.overhead_gb_per_10k == pytest.approx(per_token * 10_000 / GIB, abs=1e-6)
    assert calibration.metadata.quality.max_error == pytest.approx(0, abs=1e-6)
    assert calibration.metadata.breakdown_gb.overhead == pytest.approx(OVERHEAD / GIB, abs=2e-6)
    assert any(f"{per_token}.0 bytes a token more than the log" in note for note in calibration.metadata.quality.notes)
    found = predict(calibration, 131072)
    assert found.total_bytes == pytest.approx(truth(131072) + per_token * 131072, rel=1e-5)
    assert found.overhead_bytes == pytest.approx(OVERHEAD + per_token * 131072, rel=1e-4)
    # what of it other slots take is not known, so the bound of other slots holds all of it
    four = predict(calibration, 32768, 4)
    assert abs(four.total_bytes - truth(32768, parallel=4) - 4 * per_token * 32768) <= four.uncertainty_bytes


@pytest.mark.parametrize("moved", [(0, 3, -3), (0, -20, -40), (0, 2, 3)])
def test_an_overhead_on_no_rising_line_has_no_slope(moved: tuple[int, int, int]) -> None:
    loads = [load(c, overhead=OVERHEAD + more * MIB) for c, more in zip((8192, 16384, 32768), moved, strict=True)]
    if min(moved) < -8:
        with pytest.raises(UntrustedError, match="beyond the log"):
            fit_record(record(*loads))
        return
    assert fit_record(record(*loads)).metadata.bands[-1].overhead_gb_per_10k is None


def test_far_from_the_loads_the_truth_is_inside_the_interval_where_the_overhead_is_not_constant() -> None:
    """Measured with an f32 cache at 2,048 to 8,192 tokens: 400 bytes a token more than the log says."""
    for per_token in (0, 48, 200, 400, 1500):
        calibration = fit_record(record(*(growing(c, per_token) for c in (2048, 4096, 8192))))  # type: ignore[arg-type]
        found = predict(calibration, 131072)
        assert abs(found.total_bytes - truth(131072) - per_token * 131072) <= found.uncertainty_bytes, per_token


def test_other_slots_may_take_growth_that_short_loads_could_not_show() -> None:
    """52 bytes a cell, as llama.cpp's bookkeeping takes: hidden below a meter's reading at 2,048 to 8,192 tokens."""
    calibration = fit_record(record(*(growing(c, 52) for c in (2048, 4096, 8192))))  # type: ignore[arg-type]
    assert calibration.metadata.bands[-1].overhead_gb_per_10k is None
    for slots in (2, 4, 8):
        found = predict(calibration, 8192, slots)
        assert found.total_bytes + found.uncertainty_bytes >= truth(8192, parallel=slots) + slots * 52 * 8192


def on_host(context: int, batch: int, overhead: int) -> Load:
    """A load on the host; its process holds ``overhead`` beyond the log."""
    made = load(context, batch, overhead=overhead)
    assert made.facts is not None
    devices = {"CPU": msgspec.structs.replace(made.facts.devices["CUDA0"], kind="host")}
    return msgspec.structs.replace(made, ready=1.0, facts=msgspec.structs.replace(made.facts, devices=devices, caches=()))


@pytest.mark.parametrize(("middle", "trusted"), [(863, True), (900, False)])
def test_room_for_a_graph_goes_with_the_batch(middle: int, trusted: bool) -> None:
    """qwen3next on the host: 431, 862 and 1 725 MiB of the overhead at 512, 1 024 and 2 048 (Ollama 0.33); it was refused."""
    loads = [on_host(4096, 512, 476 * MIB), on_host(16384, 1024, (45 + middle) * MIB)]
    loads += [on_host(context, 2048, 1770 * MIB) for context in (2048, 8192, 16384)]
    run = record(*loads, limits=((4096, 512), (32768, 1024), (131072, 2048)))
    run = msgspec.structs.replace(run, machine=msgspec.structs.replace(run.machine, target="host", meter="host"))
    if not trusted:
        with pytest.raises(UntrustedError, match="beyond the log"):
            fit_record(run)
        return
    made = fit_record(run)
    assert [round((band.overhead_gb or 0) * 1024) for band in made.metadata.bands] == [476, 908, 0]
    assert predict(made, 4096).total_bytes < predict(made, 4096, num_batch=2048).total_bytes - 1200 * MIB
    assert any("goes with the physical batch" in note for note in made.metadata.quality.notes)


@pytest.mark.parametrize(
    ("architecture", "version", "beyond", "counted"),
    [
        ("qwen3next", "b11549", 450, False),
        ("qwen3next", "0.33.0", 450, False),
        ("qwen3next", "b9000", 450, True),  # how much an older one reserves was not looked at
        ("qwen3next", None, 450, True),
        ("qwen3next", "b11549", 400, True),  # too little to hold it: another engine
        ("qwen2", "b11549", 450, True),
    ],
)
def test_room_that_no_graph_fills_is_not_counted(architecture: str, version: str | None, beyond: int, counted: bool) -> None:
    """qwen3next, u = 512, after a prompt: 681 MiB with ``MALLOC_PERTURB_``, 265 without; 394 are the room."""
    run = record(*(on_host(context, 512, beyond * MIB) for context in (2048, 4096, 8192)))
    run = msgspec.structs.replace(
        run, machine=msgspec.structs.replace(run.machine, target="host", meter="host"),
        model=msgspec.structs.replace(run.model, architecture=architecture), engine=EngineVersion(version=version),
    )  # fmt: skip
    made = fit_record(run)
    room = 0.0 if counted else 512 * 40 * 30 * 2 * 336 / MIB
    assert (made.metadata.breakdown_gb.overhead or 0) * 1024 == pytest.approx(beyond - room, abs=0.1)
    assert any("are not counted" in note for note in made.metadata.quality.notes) is not counted
    assert from_document(msgspec.to_builtins(made)) == made, "its loads are on its line"
