"""Verdicts against the real llama-server: a few cards of `make bench-verdicts`, on a device made of this machine's CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.fitting import calibrate, judge_cards
from bench.models import Shape, llama, qwen3moe
from tests.support.truth import Device

pytestmark = pytest.mark.requires("embedded")


@pytest.mark.parametrize("shape", [llama(feed=1024), qwen3moe(expert_feed=128)], ids=["dense", "experts"])
def test_the_engine_does_what_the_verdict_says(shape: Shape, tmp_path: Path) -> None:
    model = shape.write(tmp_path / "model.gguf")
    with Device(tmp_path) as device:
        calibration = calibrate(device, tmp_path / "store", model, "q8_0", contexts=(1024, 4096))
        cards = judge_cards(device, model, "q8_0", calibration, [24576], [1.011, 0.989, 0.8, 0.4])
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
