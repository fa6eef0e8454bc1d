"""Several devices, against what an engine did: virtual CUDA devices of one H100."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import yaml

from harness.engines.ollama.policy import OllamaPolicy
from harness.model.calibration import Calibration, from_document
from harness.prediction.verdict import Verdict
from harness.render.reasons import explained
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, with_settings, with_version
from tests.support.rules import judge, judge_together

GOLDEN = Path(__file__).parents[2] / "golden" / "llama-server" / "b11434-cuda-h100"
DECISIONS = json.loads((GOLDEN / "decisions.json").read_text())


def as_the_engine_read_it(name: str) -> Calibration:
    """A calibration without the driver's part: virtual devices share it, and free memory was read when it was there."""
    found = from_document(yaml.safe_load((GOLDEN / name / f"{name}.yaml").read_text()))
    metadata = found.metadata
    overhead = metadata.breakdown_gb.overhead or 0.0
    bands = tuple(
        msgspec.structs.replace(band, base_vram_gb=band.base_vram_gb - overhead, overhead_gb=None) for band in metadata.bands
    )
    breakdown = msgspec.structs.replace(metadata.breakdown_gb, overhead=0.0)
    placement = msgspec.structs.replace(metadata.placement, start_gb=None)
    changed = msgspec.structs.replace(metadata, bands=bands, breakdown_gb=breakdown, placement=placement)
    return msgspec.structs.replace(found, metadata=changed)


def judged(decision: dict[str, object]) -> Verdict:
    free = tuple(one * MIB for one in decision["free_mib"])  # type: ignore[attr-defined]
    return judge(as_the_engine_read_it(str(decision["model"])), int(str(decision["context"])), 1, free)


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda one: f"{one['model']}-{one['devices']}-{one['free_mib'][0]}")
def test_one_two_and_four_cards_are_judged_as_the_engine_decided(decision: dict[str, object]) -> None:
    verdict = judged(decision)
    assert verdict.verdict == ("fits" if decision["unchanged"] else "offload")
    if decision["unchanged"]:
        return
    layers: list[list[int]] = decision["layers"]  # type: ignore[assignment]
    assert abs((verdict.layers_offloaded or 0) - sum(one[0] for one in layers)) <= len(layers)
    assert abs((verdict.layers_overflowing or 0) - sum(one[1] for one in layers)) <= 1


def test_copies_of_a_pipeline_are_counted_on_each_card() -> None:
    verdict = judge(as_the_engine_read_it("mid-8b"), 131072, 1, (39 * GIB, 39 * GIB))
    used = [11417, 10401]  # MiB, devices-2-full-131072.log
    for one, true in zip(verdict.devices, used, strict=True):
        assert abs(one.required_bytes / MIB - true) <= min((verdict.uncertainty_bytes or 0) / MIB, 0.01 * true)


def test_a_card_that_is_short_is_never_made_up_for_by_another() -> None:
    calibration = made_up()
    need = judge(calibration, 131072, 1, (80 * GIB,)).required_bytes or 0
    for first, second in ((0.5, 0.5), (0.9, 0.1), (0.55, 0.5)):
        free = (round(need * first) + GIB, round(need * second) + GIB)
        verdict = judge(calibration, 131072, 1, free)
        assert verdict.verdict == "offload", "copies and the driver's part come twice"
        assert verdict.tight or any(one.short_bytes for one in verdict.devices)


def test_a_driver_is_paid_on_every_card() -> None:
    one = judge(made_up(), 8192, 1, (80 * GIB,)).required_bytes or 0
    verdict = judge(made_up(), 8192, 1, (80 * GIB,) * 3)
    overhead = (made_up().metadata.breakdown_gb.overhead or 0) * GIB
    assert sum(card.required_bytes for card in verdict.devices) >= one + 2 * overhead
    assert sum(card.layers or 0 for card in verdict.devices) == verdict.layers_total


def test_the_largest_context_over_two_cards_fits_and_more_does_not() -> None:
    free = (5 * GIB, 4 * GIB)
    most = judge(made_up(), 8192, 1, free).max_context or 0
    assert 0 < most < 131072
    assert judge(made_up(), most, 1, free).verdict == "fits"
    assert judge(made_up(), most + 256, 1, free).verdict == "offload"


def test_two_models_share_the_cards_that_they_use() -> None:
    verdicts, fates = judge_together([(made_up(), 8192, 1), (made_up(), 8192, 1)], (7 * GIB, 7 * GIB))
    assert fates[0] == "resident"
    first, second = (sum(one.available_bytes for one in verdict.devices) for verdict in verdicts)
    assert first - second == verdicts[0].required_bytes


class TestOllama:
    def calibration(self, **env: str) -> Calibration:
        found = with_version(made_up(), "0.33.0")
        return msgspec.structs.replace(with_settings(found, env=env), id="ollama/made-up", engine="ollama")

    def test_the_card_with_most_free_is_taken_alone_where_the_estimate_is_small(self) -> None:
        verdict = judge(self.calibration(), 8192, 1, (8 * GIB, 24 * GIB))
        assert [(one.name, one.layers) for one in verdict.devices] == [("GPU1", 29)]
        assert verdict.source == "measured"
        text = explained(verdict)
        assert text[0].startswith("1. estimate ")
        assert "80 % of GPU1's 24.0 GiB" in text[0]

    def test_a_model_above_the_share_is_spread_and_the_reasons_say_so_in_order(self) -> None:
        verdict = judge(self.calibration(), 32768, 1, (6 * GIB, 6 * GIB))
        assert [one.name for one in verdict.devices] == ["GPU0", "GPU1"]
        assert verdict.source == "derived"
        steps = [one.step for one in verdict.reasons]
        assert steps[:2] == ["no-single-card", "spread"]
        assert "spread over GPU0 and GPU1" in explained(verdict)[1]

    def test_an_older_one_over_several_cards_is_unknown(self) -> None:
        old = with_version(self.calibration(), "0.20.2")
        assert OllamaPolicy.name == old.engine
        assert judge(old, 8192, 1, (24 * GIB, 24 * GIB)).verdict == "unknown"
