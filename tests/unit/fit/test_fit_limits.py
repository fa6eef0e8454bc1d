"""Both sides of every limit of the fit and of the load plan: what is still accepted, and what no longer is."""

from __future__ import annotations

import msgspec
import pytest

from harness.errors import UntrustedError
from harness.fit.constants import fit_record
from harness.fit.load_plan import further_loads, plan_loads
from harness.fit.observations import allowed_spread, points_of, spill_reason
from harness.fit.speed import fit_performance
from harness.model.calibration import Calibration
from harness.model.facts import DeviceFacts
from harness.model.record import Load, LoadRequest, Record, Reported, Speed
from harness.model.trace import Occupancy
from harness.units import GIB, MIB
from tests.support.records import COMPUTE_START, OVERHEAD, WEIGHTS, facts, load, record
from tests.support.true_model import TrueModel

CONTEXTS = (8192, 16384, 32768)
OLLAMA = ((4096, 512), (32768, 1024), (1 << 31, 2048))


def altered(
    one: Load, *, overhead: int = 0, weights: int = 0, kv_cache: int = 0, compute: float = 0, **changes: object
) -> Load:
    """A load that took more than it would have; the log sees all of it but the overhead. Bytes."""
    assert one.facts is not None
    assert one.busy is not None
    device = one.facts.devices["CUDA0"]
    grown = DeviceFacts(
        kind="gpu",
        weights_bytes=(device.weights_bytes or 0) + weights,
        kv_cache_bytes=(device.kv_cache_bytes or 0) + kv_cache,
        compute_bytes=(device.compute_bytes or 0) + round(compute),
    )
    seen = msgspec.structs.replace(one.facts, devices={**one.facts.devices, "CUDA0": grown}, **changes)
    more = overhead + weights + kv_cache + round(compute)
    plateau = msgspec.structs.replace(one.busy, total_bytes=(one.busy.total_bytes or 0) + more)
    return msgspec.structs.replace(one, facts=seen, idle=plateau, busy=plateau)


def refusal(run: Record) -> str | None:
    """The code with which a run is refused; ``None`` where it is fitted."""
    try:
        fit_record(run)
    except UntrustedError as error:
        return error.code
    return None


def test_the_overhead_may_differ_by_eight_mebibytes_or_half_a_percent() -> None:
    assert allowed_spread(0) == 8 * MIB
    assert allowed_spread(1600 * MIB) == 8 * MIB
    assert allowed_spread(16 * GIB) == pytest.approx(0.005 * 16 * GIB)


@pytest.mark.parametrize("weights", [0, -3900 * MIB])
def test_an_overhead_that_moves_further_than_that_voids_the_run(weights: int) -> None:
    """The load in the middle stands out, so that no straight line explains it; the smaller model's limit is 8 MiB."""
    plain = [altered(load(context), weights=weights) for context in CONTEXTS]
    assert plain[-1].busy is not None
    most = int(allowed_spread(plain[-1].busy.total_bytes or 0))
    assert (most == 8 * MIB) == (weights < 0)
    for more, code in ((most, None), (most + 1, "overhead-moves")):
        assert refusal(record(plain[0], altered(plain[1], overhead=more), plain[2])) == code


def out_of_line(share: float) -> Record:
    """The last of three loads is predicted with this relative error from the two others: three times the middle one's."""
    loads = [load(context) for context in CONTEXTS]
    assert loads[-1].busy is not None
    more = share * (loads[-1].busy.total_bytes or 0) / 3
    return record(loads[0], altered(loads[1], compute=more), loads[2])


def test_a_load_left_out_is_predicted_to_one_percent_or_the_run_is_void() -> None:
    assert fit_record(out_of_line(0.0097)).metadata.quality.max_error == pytest.approx(0.0097, rel=0.01)
    assert refusal(out_of_line(0.0103)) == "not-a-line"


def placed_by_law(share: float) -> Calibration:
    """Batch 512 has one load, and batch 1024 grows by so much more than one mask a token."""
    three = [altered(load(context, batch=1024), compute=share * 2 * 1024 * context) for context in CONTEXTS]
    return fit_record(record(load(4096), *three, limits=((4096, 512), (1 << 31, 1024))))


@pytest.mark.parametrize(("share", "words"), [(0.019, ", confirmed by"), (0.021, "not confirmed by")])
def test_a_slope_confirms_the_law_of_growth_to_two_percent_of_a_row(share: float, words: str) -> None:
    assert words in " ".join(placed_by_law(share).metadata.quality.notes)


def bent(mib: float, *contexts: int, weights: int = 0) -> Record:
    """Without flash attention; the second load's compute buffers lie beside the line of the others."""
    plain = [altered(load(context), weights=weights, flash_attention="disabled") for context in contexts or CONTEXTS]
    return record(plain[0], altered(plain[1], compute=mib * MIB), *plain[2:])


@pytest.mark.parametrize(
    ("mib", "weights", "more"),
    [
        (0.6, 0, []),  # 64 % of it remain beside the fitted line; the limit is 1e-4 of 5.3 GiB
        (1.0, 0, [4096, 24576]),
        (0.15, -3 * GIB, []),  # of 2.3 GiB
        (0.5, -3 * GIB, [4096, 24576]),
    ],
)
def test_a_bend_is_measured_on_both_sides_where_rounding_cannot_explain_it(mib: float, weights: int, more: list[int]) -> None:
    assert [one.context for one in further_loads(bent(mib, weights=weights))] == more


@pytest.mark.parametrize(("train", "said"), [(32768, False), (32769, True)])
def test_a_range_that_a_bend_cuts_short_is_said(train: int, said: bool) -> None:
    run = bent(2.0)
    run = msgspec.structs.replace(run, model=msgspec.structs.replace(run.model, train_context=train))
    quality = fit_record(run).metadata.quality
    assert quality.valid_to == 32768
    assert any("valid to 32,768" in note for note in quality.notes) == said


@pytest.mark.parametrize(
    ("sizes", "valid_to"),
    [((8.0, 16.0, 32.0), 131072), ((8.0, 17.0, 25.5), 32768), ((8.0, 17.0, 35.0), 131072), ((8.0, 17.0), 16384)],
    ids=["one mask a token", "Ollama 0.24", "a line of its own", "two loads that show no line"],
)
def test_flash_attention_is_no_proof_that_compute_is_a_line(sizes: tuple[float, ...], valid_to: int) -> None:
    """0.24's llama runner with qwen2 0.5B: 85.5, 94.5, 103.0 MiB at 8k, 16k, 32k tokens, then 3 KiB a token."""
    loads = []
    for context, mib in zip(CONTEXTS, sizes, strict=False):
        one = load(context)
        law = 2 * 512 * context / MIB
        loads.append(altered(one, compute=(mib - law) * MIB))
    assert fit_record(record(*loads)).metadata.quality.valid_to == valid_to


def test_two_parallel_lines_are_no_bend() -> None:
    """A step between the loads: no context is where one line passes into the other, and none is made up."""
    plain = [altered(load(context), flash_attention="disabled") for context in (8192, 16384, 32768, 65536)]
    stepped = [*plain[:2], *(altered(one, compute=2 * MIB) for one in plain[2:])]
    quality = fit_record(record(*stepped)).metadata.quality
    assert not any("bend at" in note for note in quality.notes)
    assert quality.valid_to == 65536


def test_a_plan_grows_to_five_loads_and_no_further() -> None:
    assert len(further_loads(bent(5.0, 8192, 16384, 32768, 65536))) == 1
    assert further_loads(bent(5.0, 8192, 16384, 24576, 32768, 65536)) == ()


@pytest.mark.parametrize(("window", "contexts"), [(1536, [8192, 16384, 32768]), (1792, [8192, 16384, 32768, 1024])])
def test_a_window_is_loaded_below_its_full_size_from_2304_cells_on(window: int, contexts: list[int]) -> None:
    """Its cache has as many cells as window and batch (512): at 2 048 cells, no context below it is worth a load."""
    model = TrueModel(
        weights=400 * MIB, overhead=300 * MIB, kv_per_cell=1024, window=window, window_per_cell=12_288, flash_attention=False
    )
    assert [one.request.context for one in model.run().loads] == contexts


def test_lower_bands_are_loaded_at_their_upper_end_and_at_16384_tokens_at_most() -> None:
    loads = plan_loads(CONTEXTS, 131_072, batch_limits=OLLAMA)
    assert [(one.context, one.num_batch) for one in loads[:2]] == [(4096, 512), (16384, 1024)]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_device_that_is_16_mib_from_its_baseline_has_come_back_and_no_more(sign: int) -> None:
    """It matters for what was measured as the rise of the whole device."""
    loads = []
    for one in map(load, CONTEXTS):
        assert one.busy is not None
        plateau = msgspec.structs.replace(one.busy, basis="device-delta", reason="no memory by process")
        loads.append(msgspec.structs.replace(one, idle=plateau, busy=plateau))
    for moved, code in ((16 * MIB, None), (16 * MIB + 1, "baseline-moved")):
        run = msgspec.structs.replace(
            record(*loads),
            before=Occupancy(devices={"GPU-a": GIB}),
            after=Occupancy(devices={"GPU-a": GIB + sign * moved}),
        )
        assert refusal(run) == code


@pytest.mark.parametrize(("logged", "allowed"), [(50 * MIB, MIB), (400 * MIB, 4 * MIB)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_engines_own_figure_may_differ_by_one_percent_or_one_mebibyte(logged: int, allowed: int, sign: int) -> None:
    device = DeviceFacts(kind="gpu", weights_bytes=logged)
    for off, notes in ((allowed, 0), (allowed + 1, 1)):
        one = msgspec.structs.replace(
            load(8192, devices={"CUDA0": device}), reported=Reported(gpu_bytes=logged + sign * off, total_bytes=0)
        )
        assert sum("own figure" in note for note in points_of(record(one))[1]) == notes


def test_a_load_with_more_than_one_mebibyte_of_weights_elsewhere_is_no_point() -> None:
    for less, points in ((MIB, 3), (MIB + 1, 2)):
        run = record(load(8192), altered(load(16384), weights=-less), load(32768))
        assert len(points_of(run)[0]) == points


def test_a_log_in_tenths_may_differ_by_twice_its_rounding() -> None:
    for less, points in ((8 * MIB, 3), (8 * MIB + 1, 2)):
        loads = [altered(load(context), uncertainty_bytes=4 * MIB) for context in CONTEXTS]
        assert len(points_of(record(loads[0], altered(loads[1], weights=-less), loads[2]))[0]) == points


@pytest.mark.parametrize(
    ("dialect", "missing", "point"), [("ollama-go", 1, True), ("ollama-go", 2, False), ("llama.cpp", 1, False)]
)
def test_an_output_layer_on_the_host_is_no_missing_layer_where_it_is_placed_last(
    dialect: str, missing: int, point: bool
) -> None:
    """Ollama's Go engine places the output layer last, llama.cpp first."""
    seen = facts(8192, layers_offloaded=29 - missing, dialect=dialect)
    assert (spill_reason(seen, "gpu") is None) == point


@pytest.mark.parametrize("batch", [256, 1024])
def test_a_load_that_ran_with_another_batch_is_no_point(batch: int) -> None:
    points, notes = points_of(record(load(8192), load(16384, num_batch=batch)))
    assert [point.context for point in points] == [8192]
    assert f"batch {batch}, not 512" in " ".join(notes)


@pytest.mark.parametrize(("prompt", "depths"), [(80, [72]), (81, [64, 81])])
def test_prompts_within_a_quarter_of_each_other_are_one_depth(prompt: int, depths: list[int]) -> None:
    speeds = tuple(
        Speed(prompt_tokens=tokens, prompt_tokens_per_s=900.0, decode_tokens=48, decode_tokens_per_s=60.0)
        for tokens in (64, prompt)
    )
    timed = Load(request=LoadRequest(context=8192, purpose="speed"), outcome="ok", speeds=speeds)
    assert [one.depth for one in fit_performance(record(timed))[0].depths] == depths


def test_the_compute_of_another_batch_follows_by_its_share() -> None:
    """Half the batch: half the compute buffers at the start, and half the growth."""
    low = placed_by_law(0.0).metadata.bands[0]
    assert low.compute_gb_per_10k * GIB == pytest.approx(2 * 512 * 10_000, rel=1e-4)
    assert (low.base_vram_gb - (low.fixed_cache_gb or 0)) * GIB == pytest.approx(WEIGHTS + OVERHEAD + COMPUTE_START, rel=1e-6)


def test_a_context_that_did_not_fit_is_never_inside_the_range() -> None:
    """Nothing was seen at 65 536 tokens, so no verdict stands on it, whatever happened at a smaller context later."""
    killed = [
        Load(request=LoadRequest(context=context, num_batch=512), outcome="wont-fit", reason="signal: killed")
        for context in (65_536, 768)
    ]
    quality = fit_record(record(*(load(context) for context in CONTEXTS), *killed)).metadata.quality
    assert quality.valid_to == 32768
    assert any("a load at 65,536 tokens did not fit here" in note for note in quality.notes)
