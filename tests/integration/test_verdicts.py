"""Verdicts against the real llama-server: a few cards of `make bench-verdicts`, on a device made of this machine's CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.models import Shape, llama, qwen3moe

pytestmark = pytest.mark.requires("rpc")


@pytest.mark.parametrize("kv_cache_type", ["f16", pytest.param("q8_0", marks=pytest.mark.requires("rpc-quantised"))])
@pytest.mark.parametrize("shape", [llama(feed=1024), qwen3moe(expert_feed=128)], ids=["dense", "experts"])
def test_the_engine_does_what_the_verdict_says(shape: Shape, kv_cache_type: str, tmp_path: Path) -> None:
    from bench.fitting import calibrate, judge_cards
    from tests.support.truth import Device

    model = shape.write(tmp_path / "model.gguf")
    with Device(tmp_path) as device:
        calibration = calibrate(device, tmp_path / "store", model, kv_cache_type, contexts=(1024, 4096))
        cards = judge_cards(device, model, kv_cache_type, calibration, [24576], [1.011, 0.989, 0.8, 0.4])
    assert [card.truth.full for card in cards] == [True, False, False, False]
    for card in cards:
        assert not card.false_fit
        assert not card.false_offload
        assert (card.layers_off or 0) <= 1
        assert card.placed is not None
        if not card.truth.full:
            assert card.placed.host_share == pytest.approx(card.truth.host_share, abs=0.1)
        if card.truth.overflowing:
            assert card.placed.overflowing == pytest.approx(card.truth.overflowing, abs=1)
    assert any(card.truth.overflowing for card in cards) == (shape.architecture == "qwen3moe")
