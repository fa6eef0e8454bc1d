"""What ``import harness`` offers to programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import harness
from harness.errors import NotFoundError, UsageError
from harness.units import GIB
from tests.support.calibrations import made_up, store_of, with_settings

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there_and_documented() -> None:
    for name in harness.__all__:
        assert getattr(harness, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = harness.nothing_of_the_kind


def test_predictions_by_name_and_by_calibration_agree(tmp_path: Path) -> None:
    store_of(tmp_path, made_up())
    calibration = harness.load_calibration("made-up", store=tmp_path)
    assert harness.predict("made-up", 20_000, store=tmp_path) == harness.predict(calibration, 20_000)
    with pytest.raises(NotFoundError):
        harness.load_calibration("nobody", store=tmp_path)


def test_the_only_variant_is_taken_and_several_are_named(tmp_path: Path) -> None:
    store_of(tmp_path, one=made_up(gpu="elsewhere"))
    assert harness.load_calibration("made-up", store=tmp_path).id == "llama-server/made-up"
    store_of(tmp_path, two=with_settings(made_up(gpu="elsewhere"), kv_cache_type="q8_0"))
    with pytest.raises(NotFoundError, match="one, two"):
        harness.load_calibration("made-up", store=tmp_path)
    two = harness.load_calibration("made-up", variant="two", store=tmp_path)
    assert two.metadata.settings.kv_cache_type == "q8_0"


@pytest.mark.parametrize("available", ["24GiB", 24 * GIB, [24 * GIB]])
def test_free_memory_can_be_given_as_text_or_bytes(tmp_path: Path, available: object) -> None:
    store_of(tmp_path, made_up())
    found = harness.check("made-up@8192", available=available, store=tmp_path)  # type: ignore[arg-type]
    assert found.fits
    assert found.models[0].details is not None
    assert found.models[0].details.available_bytes == 24 * GIB


def test_require_fit_is_a_guard(tmp_path: Path) -> None:
    store_of(tmp_path, made_up())
    judged = harness.require_fit("made-up", ctx=8192, available="24GiB", store=tmp_path)
    assert judged.verdict == "fits"
    with pytest.raises(harness.OffloadLikelyError, match="CPU OFFLOAD LIKELY"):
        harness.require_fit("made-up", ctx=65536, available="5GiB", store=tmp_path)
    with pytest.raises(harness.UnknownVerdictError) as caught:
        harness.require_fit("nobody", ctx=8192, store=tmp_path)
    assert caught.value.hint == "harness calibrate nobody"
    with pytest.raises(UsageError):
        harness.require_fit("made-up", store=tmp_path)


def test_a_log_is_read_from_its_path_text_or_bytes() -> None:
    log = ROOT / "tests/golden/llama-server/b10434/host-8192.log"
    (facts,) = harness.parse_log(log)
    assert facts.context_cells == 8192
    assert harness.parse_log(log.read_text()) == harness.parse_log(log.read_bytes()) == [facts]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"available": -5}, "size"),
        ({"available": []}, "size"),
        ({"available": [24 * GIB, None]}, "size"),
        ({"available": 1.5}, "size"),
        ({"available": True}, "size"),
        ({"reserve": -5}, "size"),
        ({"num_parallel": "4"}, "--num-parallel"),
        ({"num_parallel": True}, "--num-parallel"),
        ({"num_parallel": 300}, "llama-server has at most 256 slots"),
        ({"gpu": "0", "available": "24GiB,24GiB"}, "--gpu 0 is one GPU"),
        ({"gpu_layers": 1.5}, "--gpu-layers"),
        ({"fit": None}, "--fit"),
        ({"flash_attention": "yes"}, "flash attention"),
    ],
)
def test_a_value_that_no_option_has_is_not_passed_over(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    store_of(tmp_path, made_up())
    with pytest.raises(UsageError, match=said):
        harness.check("made-up@8192", store=tmp_path, **{"available": "24GiB", **options})


def test_flash_attention_is_understood_as_options_and_as_records_say_it(tmp_path: Path) -> None:
    store_of(tmp_path, made_up())

    def found(said: str) -> str:
        return harness.check("made-up@8192", available="24GiB", flash_attention=said, store=tmp_path).verdict  # type: ignore[arg-type]

    assert (found("on"), found("off")) == (found("enabled"), found("disabled")) == ("fits", "unknown")


def test_no_model_is_no_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model"):
        harness.check(ctx=8192, available="24GiB", store=tmp_path)
