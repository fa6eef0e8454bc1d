"""Settings for a budget: every choice is what ``check`` says of it, and the cheapest one that reaches the demand is first."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engines.registry import policy_of
from harness.errors import UnknownVerdictError
from harness.fit.constants import fit_record
from harness.model.calibration import SHARED_CACHE, Calibration
from harness.prediction.host import HostMemory
from harness.prediction.memory import predict
from harness.prediction.settings import AskedSettings, at_batch, derive
from harness.prediction.tuning import Choice, Demand, Tuning, tune
from harness.prediction.verdict import judge
from harness.units import GIB
from tests.support.calibrations import made_up, on_host, with_settings
from tests.support.records import load, record

RULES = policy_of("llama-server")
KEY = "llama-server/made-up"


def known_layers(calibration: Calibration) -> Calibration:
    """With a window in every second layer, so that its cache can be exchanged for another type."""
    placement = msgspec.structs.replace(calibration.metadata.placement, layer_kinds="wf" * 14)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, placement=placement))


MADE_UP = known_layers(made_up())


def tuned(gib: float, *, files: tuple[tuple[str, Calibration], ...] = ((KEY, MADE_UP),), **demand: object) -> Tuning:
    return tune(files, (int(gib * GIB),), Demand(**demand), RULES)  # type: ignore[arg-type]


def changed(choice: Choice | None) -> list[str]:
    assert choice is not None
    return [change.setting for change in choice.changes]


def test_what_fits_needs_no_change() -> None:
    best = tuned(24, context=32768).best

    assert changed(best) == []
    assert best is not None
    assert (best.context, best.kv_cache_type, best.source) == (131072, "f16", "measured")


def test_a_demand_that_does_not_fit_takes_the_smallest_change_that_reaches_it() -> None:
    best = tuned(7, context=80_000).best

    assert changed(best) == ["kv-cache"]
    assert best is not None
    assert (best.kv_cache_type, best.source) == ("q8_0", "derived")
    assert best.decode_tokens_per_s is None, "the speed of a cache that was not timed is not known"
    smaller = derive(MADE_UP, AskedSettings(kv_cache_type="q8_0")).calibration
    assert best.changes[0].saves_bytes == predict(MADE_UP, 80_000).total_bytes - predict(smaller, 80_000).total_bytes


def test_without_a_demand_what_more_would_cost_is_shown_beside_what_fits() -> None:
    found = tuned(7)

    assert changed(found.best) == []
    assert [(one.kv_cache_type, one.context > found.context) for one in found.choices[1:]] == [("q8_0", True), ("q4_0", True)]


def test_layers_on_the_host_reach_it_only_where_a_speed_was_asked_for_and_is_reached() -> None:
    assert tuned(5, context=131_072).best is None
    slow = tuned(5, context=131_072, tokens_per_s=50).best
    best = tuned(5, context=131_072, tokens_per_s=7).best

    assert slow is None
    assert best is not None
    assert changed(best) == ["layers"]
    said = judge(MADE_UP, 131_072, 1, (5 * GIB,), RULES)
    assert (best.gpu_layers, best.decode_tokens_per_s) == (said.layers_offloaded, said.decode_tokens_per_s)


def test_layers_on_a_host_that_cannot_hold_them_reach_nothing() -> None:
    files = ((KEY, MADE_UP),)
    demand = Demand(context=131_072, tokens_per_s=7)
    enough = tune(files, (5 * GIB,), demand, RULES, host=HostMemory(available=64 * GIB)).best
    assert enough is not None
    assert enough.host_required_bytes is not None
    short = tune(files, (5 * GIB,), demand, RULES, host=HostMemory(available=GIB))

    assert short.best is None
    (split,) = [one for one in short.choices if one.gpu_layers is not None and one.kv_cache_type == "f16"]
    assert split.host_short_bytes == enough.host_required_bytes - GIB
    assert str(split.misses).endswith("of host memory")


def test_a_budget_that_nothing_fits_in_says_what_is_the_least() -> None:
    found = tuned(1)

    assert found.best is None
    assert found.least_bytes is not None
    assert found.short_bytes is not None
    needed = predict(MADE_UP, found.context)
    assert found.short_bytes == needed.total_bytes + needed.uncertainty_bytes + GIB - GIB
    assert tuned(found.least_bytes / GIB + 0.001, context=found.context).best is not None


def test_slots_are_given_up_before_the_context_is_shortened() -> None:
    found = tuned(6.8, context=16384, num_parallel=8, files=((KEY, made_up()),))

    assert found.best is None
    assert changed(found.choices[0]) == ["slots"]
    assert found.choices[0].misses == "2 of 8 slots"


def test_one_card_is_enough_where_the_engine_would_spread_over_all() -> None:
    found = tune(((KEY, MADE_UP),), (7 * GIB, 24 * GIB), Demand(tokens_per_s=50), RULES)

    assert found.best is not None
    assert found.best.cards == ("GPU1",)
    assert changed(found.best)[0] == "card"
    assert found.best.decode_tokens_per_s == 60.0


def test_a_measured_cache_is_taken_before_a_derived_one() -> None:
    measured = derive(MADE_UP, AskedSettings(kv_cache_type="q8_0")).calibration
    timed = msgspec.structs.replace(measured.metadata, performance=MADE_UP.metadata.performance)
    measured = msgspec.structs.replace(measured, metadata=timed)
    best = tuned(7, context=80_000, files=((KEY, MADE_UP), (f"{KEY}@q8", measured))).best

    assert best is not None
    assert (best.calibration, best.source, best.decode_tokens_per_s) == (f"{KEY}@q8", "measured", 60.0)


def test_a_smaller_batch_saves_compute_buffers_and_only_prompts_are_slower() -> None:
    limits = ((32768, 512), (131072, 2048))
    loads = [load(8192), load(32768), load(65536, 2048), load(131072, 2048)]
    calibration = fit_record(record(*loads, limits=limits))
    fixed, beyond = at_batch(calibration, 512)

    assert beyond == 32768
    need = predict(fixed, 131_072)
    assert need.total_bytes < predict(calibration, 131_072).total_bytes
    free = need.total_bytes + need.uncertainty_bytes + GIB
    best = tune(((KEY, calibration),), (free,), Demand(context=131_072), RULES).best
    assert best is not None
    assert (best.num_batch, changed(best)) == (512, ["batch"])
    assert best.prompt_tokens_per_s is None


def test_without_flash_attention_a_batch_holds_no_further_than_its_band() -> None:
    limits = ((4096, 512), (131072, 1024))
    loads = [load(2048), load(4096), load(8192, 1024), load(131072, 1024)]
    calibration = fit_record(record(*loads, limits=limits))
    without = with_settings(calibration, flash_attention="disabled")

    assert at_batch(without, 512)[0].metadata.quality.valid_to == 4096


def test_host_memory_has_no_card_and_no_layers() -> None:
    found = tune(((KEY, on_host(MADE_UP)),), (6 * GIB,), Demand(context=131_072), RULES)

    assert all({"card", "layers"}.isdisjoint(changed(one)) for one in found.choices)


def test_a_batch_that_is_asked_for_is_the_measured_one_or_none() -> None:
    best = tune(((KEY, MADE_UP),), (24 * GIB,), Demand(), RULES, asked=AskedSettings(num_batch=512)).best
    assert best is not None
    assert (best.num_batch, changed(best)) == (512, [])
    with pytest.raises(UnknownVerdictError):
        tune(((KEY, MADE_UP),), (24 * GIB,), Demand(), RULES, asked=AskedSettings(num_batch=1024))


def test_slots_that_share_one_cache_are_not_another_number_of_slots() -> None:
    made = with_settings(MADE_UP, num_parallel=4)
    quality = msgspec.structs.replace(made.metadata.quality, notes=(SHARED_CACHE,))
    shared = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, quality=quality))
    with pytest.raises(UnknownVerdictError, match="one cache for 4 slots, not 2 slots"):
        tune(((KEY, shared),), (24 * GIB,), Demand(num_parallel=2), RULES)


def test_settings_that_no_calibration_has_are_unknown() -> None:
    with pytest.raises(UnknownVerdictError, match="no calibration here has the settings"):
        tune(((KEY, MADE_UP),), (24 * GIB,), Demand(), RULES, asked=AskedSettings(flash_attention="disabled"))


@settings(max_examples=25, deadline=None)
@given(
    free=st.integers(1, 20_000).map(lambda mib: mib << 20), context=st.integers(256, 131_072), slots=st.integers(1, 8),
    second=st.none() | st.integers(1, 20_000).map(lambda mib: mib << 20),
)  # fmt: skip
def test_every_choice_is_what_check_says_of_these_settings(free: int, context: int, slots: int, second: int | None) -> None:
    available = (free,) if second is None else (free, second)
    found = tune(((KEY, MADE_UP),), available, Demand(context=context, num_parallel=slots), RULES)

    for one in found.choices:
        calibration = derive(MADE_UP, AskedSettings(kv_cache_type=one.kv_cache_type)).calibration
        cards = [int(name.removeprefix("GPU")) for name in one.cards] or list(range(len(available)))
        said = judge(calibration, one.context, one.num_parallel, tuple(available[card] for card in cards), RULES)
        assert (one.verdict, one.required_bytes) == (said.verdict, said.required_bytes)
        assert not one.meets or (one.verdict == "fits" and one.context >= context and one.num_parallel == slots)


def test_the_bound_of_a_cache_that_is_quantised_holds_the_batch_that_is_turned() -> None:
    placement = msgspec.structs.replace(MADE_UP.metadata.placement, width=4096)
    made = msgspec.structs.replace(MADE_UP, metadata=msgspec.structs.replace(MADE_UP.metadata, placement=placement))
    batch = max(band.num_batch or 0 for band in made.metadata.bands)
    other = derive(made, AskedSettings(kv_cache_type="q8_0")).calibration
    assert predict(other, 8192).uncertainty_bytes >= predict(made, 8192).uncertainty_bytes + 4096 * batch * 4


@pytest.mark.parametrize(("made", "asked"), [("f16", "f32"), ("f32", "f16"), ("bf16", "f32"), ("f32", "q8_0")])
def test_an_f32_cache_is_derived_only_where_no_flash_attention_copies_it(made: str, asked: str) -> None:
    """65 536 tokens of f32 took 437.2 MiB in an embedded b11549, and 409.4 by the blocks of an f16 calibration."""
    for flash, derived in (("enabled", False), (None, False), ("disabled", asked != "q8_0")):
        found = derive(with_settings(MADE_UP, kv_cache_type=made, flash_attention=flash), AskedSettings(kv_cache_type=asked))
        assert bool(found.derived) == derived, flash
        assert bool(found.obstacles) != derived, flash


def test_copies_in_f16_go_with_every_cache_of_another_type_on_a_gpu() -> None:
    """CUDA reserves them for bf16 as for q8_0; taken away they are only where compute was large enough to hold them."""
    plain = MADE_UP.constants.compute_gb_per_10k
    for asked in ("bf16", "q8_0", "q4_0"):
        other = with_settings(derive(MADE_UP, AskedSettings(kv_cache_type=asked)).calibration, kv_cache_type=asked)
        copy = MADE_UP.constants.kv_cache_gb_per_10k / (MADE_UP.metadata.placement.layer_kinds or "").count("f")
        assert other.constants.compute_gb_per_10k == pytest.approx(plain + copy), asked
        back = derive(other, AskedSettings(kv_cache_type="f16")).calibration
        assert back.constants.compute_gb_per_10k == pytest.approx(plain), asked
    older = with_settings(MADE_UP, kv_cache_type="q8_0")  # an engine that reserved none
    assert derive(older, AskedSettings(kv_cache_type="f16")).calibration.constants.compute_gb_per_10k == plain
