"""What moved between two calibrations: everything beyond the measurement error, and nothing within it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.fit.constants import fit_record
from harness.fit.speed import fit_performance
from harness.model.calibration import Calibration, Performance
from harness.model.record import Load, LoadRequest, Record, Speed
from harness.prediction.drift import Effect, sentences
from harness.prediction.memory import predict_speed
from harness.units import GIB, MIB
from tests.support import records
from tests.support.records import load, record
from tests.support.rules import compare, errors_of
from tests.support.vllm_artifacts import vllm_calibration

CONTEXTS = (8192, 16384, 32768)
BASE = fit_record(record(*map(load, CONTEXTS)))


def names(old: Calibration, new: Calibration) -> set[str]:
    return {figure.name for figure in compare(old, new).moved}


def with_performance(**changes: float | None) -> Calibration:
    speeds = {"load_s": 2.0, "prompt_tokens_per_s": 900.0, "decode_tokens_per_s": 60.0, "host_decode_tokens_per_s": 10.0}
    performance = Performance(**{**speeds, **changes})  # type: ignore[arg-type]
    return msgspec.structs.replace(BASE, metadata=msgspec.structs.replace(BASE.metadata, performance=performance))


def run_with(overheads: tuple[int, ...], jitter: float = 0.0, *, weights: int = 0, slope: int = 0, compute: int = 0) -> Record:
    """A run whose log and meter are off by what a real one is: the log's rounding and an overhead that moves."""
    loads = []
    for index, (context, overhead) in enumerate(zip(CONTEXTS, overheads, strict=True)):
        one = load(context, overhead=overhead)
        assert one.facts is not None
        assert one.busy is not None
        device = one.facts.devices["CUDA0"]
        wobble = round(jitter * 0.005 * MIB * (-1) ** index)
        grown = msgspec.structs.replace(
            device,
            weights_bytes=(device.weights_bytes or 0) + weights + wobble,
            kv_cache_bytes=(device.kv_cache_bytes or 0) + slope * context - wobble,
            compute_bytes=(device.compute_bytes or 0) + compute * context + wobble,
        )
        more = weights + (slope + compute) * context
        plateau = msgspec.structs.replace(one.busy, total_bytes=(one.busy.total_bytes or 0) + more)
        facts = msgspec.structs.replace(one.facts, devices={**one.facts.devices, "CUDA0": grown})
        loads.append(msgspec.structs.replace(one, facts=facts, idle=plateau, busy=plateau))
    return record(*loads)


wobbles = st.tuples(*[st.integers(0, 3 * MIB)] * 3)


@given(wobbles, wobbles, st.floats(-1, 1), st.floats(-1, 1))
def test_nothing_within_the_error_is_reported(
    first: tuple[int, int, int], second: tuple[int, int, int], early: float, late: float
) -> None:
    """The overhead lies anywhere in the same 3 MiB in both runs, and each logged figure is rounded either way."""
    overhead = records.OVERHEAD
    # the smallest and the largest overhead are seen in both runs, so that each run's own spread is its error
    old = fit_record(run_with((overhead, overhead + first[1], overhead + 3 * MIB), early))
    new = fit_record(run_with((overhead + 3 * MIB, overhead + second[1], overhead), late))
    drift = compare(old, new)
    assert drift.moved == ()
    assert drift.effects == ()


@given(
    st.sampled_from(["weights", "slope", "compute", "overhead"]),
    st.sampled_from([-1, 1]),
    st.integers(1, 20),
    st.integers(0, 3 * MIB),
)
def test_everything_beyond_the_error_is_reported_and_nothing_else(what: str, sign: int, times: int, wobble: int) -> None:
    overheads = (records.OVERHEAD, records.OVERHEAD + wobble, records.OVERHEAD)
    old = fit_record(run_with(overheads))
    # In one figure alone: weights and overhead by more than 10 MiB, growth by 64 bytes a token.
    step = sign * times
    if what == "overhead":
        new = fit_record(run_with(tuple(one + step * 10 * MIB for one in overheads)))
    else:
        changes = {what: step * (10 * MIB if what == "weights" else 64)}
        new = fit_record(run_with(overheads, **changes))
    expected = {
        "weights": {"weights_gb", "base_vram_gb"},
        "overhead": {"overhead_gb", "base_vram_gb"},
        "slope": {"kv_cache_gb_per_10k"},
        "compute": {"compute_gb_per_10k"},
    }
    assert names(old, new) == expected[what]


@pytest.mark.parametrize("side", [0, 1])
def test_a_tolerance_is_a_bound_on_both_sides_of_it(side: int) -> None:
    """A figure just within its tolerance stays, one just beyond it moves, upwards and downwards."""
    for figure in compare(BASE, BASE).figures:
        if figure.tolerance is None:
            continue
        for sign in (-1, 1):
            edge = float(figure.old or 0.0) + sign * figure.tolerance * (1.001 if side else 0.999)
            assert msgspec.structs.replace(figure, new=edge).moved is bool(side), figure.name


def test_a_wide_overhead_widens_the_error_of_the_base_and_of_nothing_else() -> None:
    tight = errors_of(fit_record(run_with((records.OVERHEAD,) * 3)))
    wide_run = fit_record(run_with((records.OVERHEAD, records.OVERHEAD + 6 * MIB, records.OVERHEAD)))
    wide = errors_of(wide_run)
    assert wide.overhead == pytest.approx(6 * MIB, rel=1e-3)
    assert tight.overhead == 2 * MIB  # the driver's pages
    assert wide.slope == tight.slope


def test_speeds_move_beyond_their_run_to_run_spread() -> None:
    assert names(with_performance(), with_performance(decode_tokens_per_s=52.0)) == set()
    assert names(with_performance(), with_performance(decode_tokens_per_s=40.0)) == {"decode_tokens_per_s"}
    steady = with_performance(spread=0.01)
    assert names(steady, with_performance(decode_tokens_per_s=52.0, spread=0.01)) == {"decode_tokens_per_s"}
    assert names(steady, with_performance(decode_tokens_per_s=52.0, spread=0.4)) == set()
    assert names(with_performance(), with_performance(load_s=40.0)) == set()
    assert names(with_performance(), with_performance(decode_tokens_per_s=None)) == set()


def test_repeated_timings_give_the_median_and_their_spread() -> None:
    def timed(prompt: int, rate: float) -> Speed:
        return Speed(prompt_tokens=prompt, prompt_tokens_per_s=100.0, decode_tokens=48, decode_tokens_per_s=rate)

    speeds = (timed(64, 50.0), timed(64, 57.0), timed(64, 52.0), timed(1536, 40.0))
    loads = [*map(load, CONTEXTS), Load(request=LoadRequest(context=8192, purpose="speed"), outcome="ok", speeds=speeds)]
    performance = fit_record(record(*loads)).metadata.performance
    assert performance.decode_tokens_per_s == 52.0
    assert performance.spread == pytest.approx(7 / 52, abs=1e-4)
    assert [depth.depth for depth in performance.depths] == [64, 1536]


def test_a_speed_that_may_be_off_by_more_than_30_percent_is_not_given() -> None:
    def timed(rate: float) -> Speed:
        return Speed(prompt_tokens=64, prompt_tokens_per_s=100.0, decode_tokens=48, decode_tokens_per_s=rate)

    def fitted(*rates: float) -> Calibration:
        speeds = tuple(map(timed, rates))
        loads = [*map(load, CONTEXTS), Load(request=LoadRequest(context=8192, purpose="speed"), outcome="ok", speeds=speeds)]
        return fit_record(record(*loads))

    wide = fitted(19.3, 50.0, 30.0)
    assert (wide.metadata.performance.decode_tokens_per_s, wide.metadata.performance.depths) == (None, ())
    assert any("speed is not given" in note for note in wide.metadata.quality.notes)
    # one disturbed repeat of many is left out; the depth it was timed at stays
    calm = fitted(50.0, 19.3, 51.0, 52.0)
    assert calm.metadata.performance.decode_tokens_per_s == 51.0
    # an artifact of before says nothing either
    performance = msgspec.structs.replace(calm.metadata.performance, spread=1.87)
    old = msgspec.structs.replace(calm, metadata=msgspec.structs.replace(calm.metadata, performance=performance))
    assert predict_speed(old, 4096).decode_tokens_per_s is None


def test_a_busy_machine_widens_the_error_of_its_speeds() -> None:
    def timed(others: float, rate: float) -> Calibration:
        speed = Speed(prompt_tokens=64, prompt_tokens_per_s=rate, decode_tokens=48, decode_tokens_per_s=rate)
        request = LoadRequest(context=8192, purpose="speed")
        run = record(Load(request=request, outcome="ok", speeds=(speed,), cpu_by_others=others))
        machine = msgspec.structs.replace(run.machine, target="host")
        performance, _ = fit_performance(msgspec.structs.replace(run, machine=machine))
        return msgspec.structs.replace(
            BASE, metadata=msgspec.structs.replace(BASE.metadata, performance=performance, machine=machine)
        )

    assert "decode_tokens_per_s" not in names(timed(0.0, 10.0), timed(0.5, 5.0))
    assert "decode_tokens_per_s" in names(timed(0.0, 10.0), timed(0.0, 5.0))


def test_a_drift_says_what_it_means_for_common_cards() -> None:
    grown = fit_record(run_with((records.OVERHEAD,) * 3, slope=records.KV_PER_TOKEN))
    same = fit_record(run_with((records.OVERHEAD,) * 3))
    said = sentences(compare(same, grown).effects, "gpu")
    assert any(text.startswith("memory at 131,072 tokens: ") and "(+3,584.0 MiB)" in text for text in said)
    assert any(text.startswith("largest context on an 8 GiB card: ") and text.endswith("→ 48,128") for text in said), said
    # Where the context does not change (nothing fits, or everything), nothing is said.
    assert not any("on a 4 GiB card" in text or "on a 48 GiB card" in text for text in said)


def test_cards_that_lose_the_same_share_a_line() -> None:
    alike = [Effect(kind="largest-context", card_gb=card, old=131_072, new=1024) for card in (10, 24, 80)]
    assert sentences(alike, "host") == ["largest context in 10 to 80 GiB of free memory: 131,072 → 1,024"]


def test_contexts_that_were_not_loaded_are_no_smaller_card() -> None:
    shorter = msgspec.structs.replace(BASE.metadata.quality, valid_to=1024)
    other = msgspec.structs.replace(BASE, metadata=msgspec.structs.replace(BASE.metadata, quality=shorter))
    said = sentences(compare(BASE, other).effects, "gpu")
    assert said == ["calibrated range: to 131,072 → 1,024 tokens"]
    grown = fit_record(run_with((records.OVERHEAD,) * 3, slope=records.KV_PER_TOKEN))
    half = msgspec.structs.replace(grown.metadata.quality, valid_to=65_536)
    grown = msgspec.structs.replace(grown, metadata=msgspec.structs.replace(grown.metadata, quality=half))
    said = sentences(compare(BASE, grown).effects, "gpu")
    assert said[0] == "calibrated range: to 131,072 → 65,536 tokens"
    assert any("on an 8 GiB card" in text for text in said)  # memory has grown, and fewer tokens fit
    assert not any("131,072" in text for text in said[1:])


def test_settings_and_range_count_and_versions_explain() -> None:
    old = BASE
    metadata = msgspec.structs.replace(
        old.metadata,
        engine=msgspec.structs.replace(old.metadata.engine, version="b2"),
        settings=msgspec.structs.replace(old.metadata.settings, flash_attention="disabled", env={"A": "1"}),
    )
    drift = compare(old, msgspec.structs.replace(old, metadata=metadata))
    assert {figure.name for figure in drift.moved} == {"flash_attention", "env A"}
    assert [(change.name, change.old, change.new) for change in drift.changes] == [("engine", "b1", "b2")]
    assert drift.effects == ()


def test_bands_are_compared_by_their_batch() -> None:
    limits = ((4096, 512), (131072, 1024))
    old = fit_record(record(load(4096, 512), *(load(context, 1024) for context in CONTEXTS), limits=limits))
    same = fit_record(record(load(4096, 512), *(load(context, 1024) for context in CONTEXTS), limits=limits))
    assert names(old, same) == set()
    wider = fit_record(record(load(4096, 512, overhead=records.OVERHEAD), *(load(c, 2048) for c in CONTEXTS), limits=limits))
    assert {"band 1024", "band 2048", "num_batch"} <= names(old, wider)


def test_a_band_below_the_window_is_held_against_its_own_kind() -> None:
    def windowed(step: float) -> Calibration:
        top = BASE.metadata.bands[-1]
        below = msgspec.structs.replace(top, up_to=1024, base_vram_gb=top.base_vram_gb - step, fixed_cache_gb=0.0)
        metadata = msgspec.structs.replace(BASE.metadata, bands=(below, top))
        return msgspec.structs.replace(BASE, metadata=metadata)

    assert names(windowed(0.1), windowed(0.1)) == set()
    assert names(windowed(0.1), windowed(0.2)) == {"band 512 below: base_vram_gb"}
    assert names(windowed(0.1), BASE) == {"band 512 below"}


def test_settings_of_vllm_are_settings() -> None:
    old = vllm_calibration()
    assert names(old, vllm_calibration()) == set()
    assert names(old, vllm_calibration(max_num_seqs=32, arguments=("--seed", "1"))) == {"vllm max_num_seqs", "vllm arguments"}
    assert names(old, vllm_calibration(footprint=18 << 30)) >= {"base_vram_gb"}


def test_figures_rounded_by_the_go_engine_differ_by_their_rounding() -> None:
    def by_ollama(version: str, weights: int) -> Calibration:
        made = fit_record(run_with((records.OVERHEAD - weights,) * 3, weights=weights))
        metadata = msgspec.structs.replace(made.metadata, engine=msgspec.structs.replace(made.metadata.engine, version=version))
        return msgspec.structs.replace(made, engine="ollama", metadata=metadata)

    rounded = by_ollama("0.12.3", GIB // 25)
    assert "weights_gb" not in names(rounded, by_ollama("0.33.0", 0))
    assert "weights_gb" in names(by_ollama("0.30.0", GIB // 25), by_ollama("0.33.0", 0))
