"""Where memory is no longer one straight line: windows, bends, batches that were not measured."""

from __future__ import annotations

import msgspec
import pytest

from harness.errors import UntrustedError
from harness.fit.constants import fit_record
from harness.fit.growth import CELL_BYTES
from harness.fit.load_plan import MAX_LOADS, further_loads, plan_loads
from harness.model.facts import DeviceFacts
from harness.model.record import EngineVersion, Load, LoadRequest, Record
from harness.prediction.memory import predict
from harness.units import MIB, gib
from tests.support.records import record
from tests.support.true_model import GPU, TrueModel

OLLAMA = ((4096, 512), (32768, 1024), (1 << 31, 2048))
PLAIN = TrueModel(weights=400 * MIB, overhead=300 * MIB, kv_per_cell=12_288)
WINDOW = TrueModel(weights=400 * MIB, overhead=300 * MIB, kv_per_cell=1024, window=4096, window_per_cell=12_288)
NO_FLASH = msgspec.structs.replace(WINDOW, flash_attention=False, step=8192)


def with_compute(load: Load, size: int) -> Load:
    """A load whose compute buffers are something else; the meter sees it too."""
    assert load.facts is not None
    assert load.busy is not None
    device = load.facts.devices[GPU]
    more = size - (device.compute_bytes or 0)
    facts = msgspec.structs.replace(load.facts, devices={GPU: msgspec.structs.replace(device, compute_bytes=size)})
    busy = msgspec.structs.replace(load.busy, total_bytes=(load.busy.total_bytes or 0) + more)
    return msgspec.structs.replace(load, facts=facts, idle=busy, busy=busy)


def bent(*contexts: int, at: int = 11_264) -> Record:
    """Compute buffers of one slope up to ``at`` tokens, and of a larger one from there."""
    plain = msgspec.structs.replace(PLAIN, flash_attention=False)
    row = 4 * 17 * 512
    loads = [plain.load(LoadRequest(context=context, num_batch=512)) for context in contexts]
    sizes = [row * max(context, 2 * context - at) for context in contexts]
    return record(*(with_compute(load, size) for load, size in zip(loads, sizes, strict=True)))


def test_below_a_window_the_memory_of_a_model_is_another_line() -> None:
    calibration = fit_record(WINDOW.run())
    assert [band.up_to for band in calibration.metadata.bands] == [4608, 131_072]
    for context in (1024, 4096, 4608, 4864, 100_000):
        assert predict(calibration, context).total_bytes == pytest.approx(WINDOW.truth(context, 512), rel=1e-4)


def test_without_flash_attention_a_load_is_made_on_the_other_side_of_a_window() -> None:
    run = NO_FLASH.run()
    assert [load.request.context for load in run.loads] == [8192, 16384, 32768, 2304]
    calibration = fit_record(run)
    for context in (1024, 4608, 4864, 100_000):
        assert predict(calibration, context).total_bytes == pytest.approx(NO_FLASH.truth(context, 512), rel=1e-4)


def test_a_step_at_the_window_is_known_in_bands_that_were_not_loaded_below_it() -> None:
    calibration = fit_record(NO_FLASH.run(OLLAMA))
    assert predict(calibration, 4352).total_bytes == pytest.approx(NO_FLASH.truth(4352, 1024), rel=1e-4)


def test_a_window_that_no_load_filled_ends_the_range() -> None:
    model = msgspec.structs.replace(WINDOW, window=65_536)
    quality = fit_record(model.run()).metadata.quality
    assert quality.valid_to == 32_768
    assert any("sliding window" in note for note in quality.notes)


class Steep(TrueModel, frozen=True, kw_only=True):
    """Three rows a token, as the compute buffers of Ollama 0.24 from 32,768 tokens on."""

    def row(self) -> int:
        return 6


def test_a_line_that_is_steeper_than_one_mask_is_looked_at_below_the_loads() -> None:
    """Ollama 0.24, qwen2 0.5B at 40,960 to 98,304 tokens: exact there, and 55 MiB too little at 8,192."""
    shape = msgspec.structs.asdict(PLAIN)
    assert [load.request.context for load in Steep(**shape).run().loads] == [8192, 16384, 32768, 2048]
    assert [load.request.context for load in TrueModel(**shape).run().loads] == [8192, 16384, 32768]


def test_compute_that_rises_and_falls_is_named_as_such() -> None:
    """Ollama 0.24, qwen2 0.5B."""
    sizes = {4096: 77.51, 8192: 85.51, 16384: 94.5, 24576: 79.01, 32768: 103.01}
    made = [
        with_compute(PLAIN.load(LoadRequest(context=context, num_batch=512)), round(size * MIB))
        for context, size in sizes.items()
    ]
    with pytest.raises(UntrustedError) as caught:
        fit_record(record(*made))
    assert caught.value.code == "not-a-line"
    assert "rise and fall" in str(caught.value.hint)


def test_loads_that_show_a_bend_ask_for_loads_on_both_sides_of_it() -> None:
    asked = [load.context for load in further_loads(bent(8192, 16384, 32768))]
    assert asked == [4096, 24576]
    calibration = fit_record(bent(8192, 16384, 32768, *asked))
    assert [band.up_to for band in calibration.metadata.bands] == [11_264, 131_072]
    row = 4 * 17 * 512
    plain = msgspec.structs.replace(PLAIN, flash_attention=False)
    for context in (4096, 10_240, 12_288, 131_072):
        truth = plain.truth(context, 512) - plain.compute(context, 512) + row * max(context, 2 * context - 11_264)
        assert predict(calibration, context).total_bytes == pytest.approx(truth, rel=1e-3)


def test_a_bend_that_cannot_be_placed_is_refused_or_ends_the_range() -> None:
    with pytest.raises(UntrustedError) as caught:
        fit_record(bent(8192, 16384, 32768, at=24_000))
    assert caught.value.code == "not-a-line"


def test_growth_by_no_known_law_does_not_reach_beyond_the_loads_without_flash_attention() -> None:
    plain = msgspec.structs.replace(PLAIN, flash_attention=False)
    loads = [plain.load(LoadRequest(context=context, num_batch=512)) for context in (8192, 16384, 32768)]
    odd = record(*(with_compute(load, int(4 * 17.4 * 512 * load.request.context)) for load in loads))
    quality = fit_record(odd).metadata.quality
    assert quality.valid_to == 32_768
    assert any("whole rows" in note for note in quality.notes)


@pytest.mark.parametrize(("flash", "valid_to"), [(False, 32_768), (True, 131_072)])
def test_latent_attention_without_flash_attention_is_known_as_far_as_it_was_loaded(flash: bool, valid_to: int) -> None:
    run = msgspec.structs.replace(PLAIN, flash_attention=flash).run()
    latent = msgspec.structs.replace(run, model=msgspec.structs.replace(run.model, architecture="deepseek2"))
    assert fit_record(latent).metadata.quality.valid_to == valid_to


def test_bands_of_one_load_are_refused_where_their_law_is_not_confirmed() -> None:
    plain = msgspec.structs.replace(PLAIN, weights=64 * MIB, overhead=0, flash_attention=False)
    run = plain.run(OLLAMA)
    odd = [with_compute(load, int(4 * 17.4 * (load.request.num_batch or 0) * load.request.context)) for load in run.loads]
    with pytest.raises(UntrustedError) as caught:
        fit_record(msgspec.structs.replace(run, loads=tuple(odd)))
    assert caught.value.code == "law-not-confirmed"


def test_a_band_without_loads_is_named_and_its_contexts_are_not_undercut() -> None:
    run = PLAIN.run(OLLAMA)
    calibration = fit_record(msgspec.structs.replace(run, loads=run.loads[1:]))
    assert any(note.startswith("batch 512 was not measured") for note in calibration.metadata.quality.notes)
    assert predict(calibration, 4096).total_bytes > PLAIN.truth(4096, 512)


def test_constants_of_a_batch_do_not_reach_contexts_where_the_engine_takes_another() -> None:
    """The top band did not fit: what is known ends where its batch would begin."""
    loads = [PLAIN.load(LoadRequest(context=context, num_batch=1024)) for context in (8192, 16384, 32768)]
    calibration = fit_record(record(*loads, limits=OLLAMA))
    assert calibration.metadata.quality.valid_to == 32_768
    assert not predict(calibration, 40_000).within_range


def test_a_batch_that_was_asked_for_holds_at_every_context() -> None:
    loads = [PLAIN.load(LoadRequest(context=context, num_batch=1024)) for context in (8192, 16384, 32768)]
    run = record(*loads, limits=OLLAMA)
    pinned = msgspec.structs.replace(run, settings=msgspec.structs.replace(run.settings, num_batch=1024))
    assert fit_record(pinned).metadata.quality.valid_to == 131_072


def test_a_load_whose_batch_the_engine_cut_is_not_a_point() -> None:
    loads = [PLAIN.load(LoadRequest(context=context, num_batch=512)) for context in (256, 8192, 16384, 32768)]
    calibration = fit_record(record(*loads))
    assert [load.context for load in calibration.metadata.quality.loads] == [8192, 16384, 32768]
    assert any("batch 256, not 512" in note for note in calibration.metadata.quality.notes)


def test_below_its_batch_a_prediction_is_an_upper_bound_and_says_so() -> None:
    prediction = predict(fit_record(PLAIN.run()), 200)
    assert prediction.total_bytes > PLAIN.truth(200, 256)
    assert any("upper bound" in text for text in prediction.warnings)


def test_loads_of_different_slots_are_refused() -> None:
    loads = [PLAIN.load(LoadRequest(context=context), slots) for context, slots in ((8192, 1), (16384, 1), (32768, 2))]
    with pytest.raises(UntrustedError, match="parallel"):
        fit_record(record(*loads))


def test_an_output_matrix_that_left_the_gpu_at_one_load_is_no_point() -> None:
    loads = [PLAIN.load(LoadRequest(context=context)) for context in (8192, 16384, 24576, 32768)]
    last = loads[-1]
    assert last.facts is not None
    device = last.facts.devices[GPU]
    less = msgspec.structs.replace(device, weights_bytes=(device.weights_bytes or 0) - 100 * MIB)
    host = DeviceFacts(kind="host", weights_bytes=100 * MIB)
    moved = msgspec.structs.replace(last, facts=msgspec.structs.replace(last.facts, devices={GPU: less, "CPU": host}))
    calibration = fit_record(record(*loads[:-1], moved))
    assert [load.context for load in calibration.metadata.quality.loads] == [8192, 16384, 24576]
    assert any("100 MiB of weights are elsewhere" in note for note in calibration.metadata.quality.notes)


def test_a_log_that_rounds_says_by_how_much() -> None:
    loads = [PLAIN.load(LoadRequest(context=context)) for context in (8192, 16384, 32768)]
    rounded = [
        msgspec.structs.replace(load, facts=msgspec.structs.replace(load.facts, uncertainty_bytes=51 * MIB))
        for load in loads
        if load.facts
    ]
    assert any("rounds" in note for note in fit_record(record(*rounded)).metadata.quality.notes)


@pytest.mark.parametrize("train", [512, 1024, 2048, 4096, 8192, 32_768, 131_072, None])
@pytest.mark.parametrize("limits", [(), OLLAMA])
def test_plans_are_small_and_never_below_the_batch(train: int | None, limits: tuple[tuple[int, int], ...]) -> None:
    loads = plan_loads((8192, 16384, 32768), train, batch_limits=limits)
    assert 1 <= len(loads) <= MAX_LOADS
    for load in loads:
        assert load.context >= min(load.num_batch or 0, train or 1 << 31)
        assert train is None or load.context <= train


def test_the_full_window_of_a_band_loaded_below_it_follows_from_another_band() -> None:
    loads = [WINDOW.load(LoadRequest(context=4096, num_batch=512))]
    loads += [WINDOW.load(LoadRequest(context=context, num_batch=2048)) for context in (8192, 16384, 32768)]
    calibration = fit_record(record(*loads, limits=((8192, 512), (1 << 31, 2048))))
    assert [band.up_to for band in calibration.metadata.bands] == [4608, 8192, 131_072]
    for context in (2048, 4608, 4864, 8192):
        assert predict(calibration, context).total_bytes == pytest.approx(WINDOW.truth(context, 512), rel=1e-4)


def test_max_error_is_that_of_the_load_that_fits_worst() -> None:
    loads = [PLAIN.load(LoadRequest(context=context)) for context in (8192, 16384, 32768)]
    first = loads[0]
    assert first.busy is not None
    more = msgspec.structs.replace(first.busy, total_bytes=(first.busy.total_bytes or 0) + 6 * MIB)
    error = fit_record(record(msgspec.structs.replace(first, busy=more), *loads[1:])).metadata.quality.max_error
    assert error == pytest.approx(6 * MIB / (more.total_bytes or 1), rel=0.01)


def test_slots_that_share_one_cache_are_named() -> None:
    loads = []
    for context in (8192, 16384, 32768):
        load = PLAIN.load(LoadRequest(context=context), 2)
        assert load.facts is not None
        caches = tuple(msgspec.structs.replace(one, cells=2 * context, streams=1) for one in load.facts.caches)
        loads.append(msgspec.structs.replace(load, facts=msgspec.structs.replace(load.facts, caches=caches)))
    notes = fit_record(record(*loads)).metadata.quality.notes
    assert sum("hold for 2 slots" in note for note in notes) == 1


def test_a_run_without_points_asks_for_no_further_loads() -> None:
    assert further_loads(record()) == ()


@pytest.mark.parametrize("own", [1, 4])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_an_engine_chooses_its_batch_by_the_tokens_of_all_slots(own: int, slots: int) -> None:
    calibration = fit_record(WINDOW.run(OLLAMA, slots=own))
    for context in (1024, 2048, 4096, 8192, 16_384, 32_768, 100_000):
        batch = next(batch for limit, batch in OLLAMA if context * slots <= limit)
        assert predict(calibration, context, slots).total_bytes == pytest.approx(WINDOW.truth(context, batch, slots), rel=2e-3)


def test_a_smaller_batch_than_usual_is_still_within_range() -> None:
    """An engine whose memory is tight may take less than its rule says."""
    calibration = fit_record(PLAIN.run(OLLAMA))
    prediction = predict(calibration, 100_000, num_batch=1024)
    assert prediction.within_range
    assert prediction.total_bytes == pytest.approx(PLAIN.truth(100_000, 1024), rel=1e-4)


@pytest.mark.parametrize("window", [0, 1024])
@pytest.mark.parametrize("size", CELL_BYTES)
def test_on_the_host_each_slot_has_the_bookkeeping_of_its_cells(size: int, window: int) -> None:
    """Three loads of one slot predict sixteen, far out, within what a log rounds."""
    model = msgspec.structs.replace(PLAIN, cell_bytes=size, window=window, window_per_cell=1024, weights=64 * MIB)
    calibration = fit_record(model.run(contexts=(2048, 4096, 8192)))

    band = calibration.metadata.bands[-1]
    assert band.slot_overhead_gb_per_10k == gib(10_000 * size)
    assert band.slot_overhead_gb == (gib(size * model.window_cells(8192, 512)) or None)
    assert any(f"takes {size} bytes beside the log" in note for note in calibration.metadata.quality.notes)
    for context, slots in ((1024, 4), (8192, 1), (8192, 4), (131_072, 16)):
        found, truth = predict(calibration, context, slots), model.truth(context, 512, slots)
        assert found.total_bytes == pytest.approx(truth, rel=2e-4), (context, slots)
    beside = 16 * size * (131_072 + model.window_cells(131_072, 512))
    assert found.overhead_bytes == pytest.approx(model.overhead + beside, rel=1e-3)


@pytest.mark.parametrize(
    ("version", "moved", "size"), [("b11549", 24, 52), ("0.33.0", 24, 52), ("b1", 24, 40), ("b11549", 900, 0)]
)
def test_a_heap_that_moves_says_nothing_of_the_size_of_a_cell(version: str, moved: int, size: int) -> None:
    """Eight calibrations of one model to 4,096 tokens on a busy machine: 40 bytes twice, 48 once, and 52."""
    made = msgspec.structs.replace(PLAIN, cell_bytes=52).run(contexts=(1024, 2048, 4096))
    last = made.loads[-1]
    assert last.idle is not None
    idle = msgspec.structs.replace(last.idle, total_bytes=(last.idle.total_bytes or 0) - moved * 1024)
    loads = (*made.loads[:-1], msgspec.structs.replace(last, idle=idle, busy=idle))
    run = msgspec.structs.replace(made, loads=loads, engine=EngineVersion(version=version))
    notes = fit_record(run).metadata.quality.notes
    assert any(f"takes {size} bytes beside the log" in note for note in notes) == bool(size), notes


def test_a_gpu_has_no_bookkeeping_of_cells() -> None:
    """It lies on the host, so memory of other slots is exact on the GPU without it."""
    calibration = fit_record(PLAIN.run(contexts=(2048, 4096, 8192)))
    assert calibration.metadata.bands[-1].slot_overhead_gb_per_10k is None
    assert predict(calibration, 8192, 4).total_bytes == pytest.approx(PLAIN.truth(8192, 512, 4), rel=1e-5)


def test_planned_loads_have_the_bookkeeping_of_their_own_cells() -> None:
    """``--quick`` makes one load, whose overhead the planned ones have."""
    model = msgspec.structs.replace(PLAIN, cell_bytes=CELL_BYTES[-1])
    made = model.run(contexts=(2048, 4096, 8192))
    planned = tuple(
        msgspec.structs.replace(
            load, idle=None, busy=None, ready=0.0, request=msgspec.structs.replace(load.request, purpose="planned")
        )
        for load in made.loads[1:]
    )
    calibration = fit_record(msgspec.structs.replace(made, loads=(made.loads[0], *planned)))
    assert predict(calibration, 131_072, 4).total_bytes == pytest.approx(model.truth(131_072, 512, 4), rel=1e-5)


@pytest.mark.parametrize(("off", "refused"), [(-6 * MIB, False), (6 * MIB, True)])
def test_a_smallest_load_below_the_line_of_the_others_is_an_observation(off: int, refused: bool) -> None:
    """An f32 cache, measured: 4 MiB less at 512 tokens than the line of 2,048 to 8,192 says. More would be another line."""
    model = msgspec.structs.replace(PLAIN, weights=64 * MIB, overhead=30 * MIB)
    loads = [model.load(LoadRequest(context=context, num_batch=512)) for context in (512, 2048, 4096, 8192)]
    compute = loads[0].facts.devices[GPU].compute_bytes  # type: ignore[union-attr]
    run = record(with_compute(loads[0], (compute or 0) + off), *loads[1:])
    if refused:
        with pytest.raises(UntrustedError, match="left out"):
            fit_record(run)
        return
    calibration = fit_record(run)
    assert [load.context for load in calibration.metadata.quality.loads] == [2048, 4096, 8192]
    assert any(
        "context 512: not a point of the fit (6.0 MiB below the line" in note for note in calibration.metadata.quality.notes
    )
    assert predict(calibration, 131_072).total_bytes == pytest.approx(model.truth(131_072, 512), rel=1e-4)
