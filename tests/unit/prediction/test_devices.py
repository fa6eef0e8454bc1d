"""Several devices, against what an engine did: virtual CUDA devices of one H100."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from harness.engines.ollama.policy import OllamaPolicy
from harness.model.calibration import Calibration, Placement, SetCompute
from harness.model.record import Gpu
from harness.model.validation import from_document
from harness.prediction.verdict import Verdict
from harness.render.reasons import explained
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, with_settings, with_version
from tests.support.rules import judge, judge_together
from tests.unit.prediction.test_placement import MOE, model

GOLDEN = Path(__file__).parents[2] / "golden" / "llama-server" / "b11434-cuda-h100"
DECISIONS = json.loads((GOLDEN / "decisions.json").read_text())
#: Of the models there (``n_embd`` in their logs); calibrations have it since.
WIDTHS = {"mid-8b": 4096, "moe": 2048}


def as_the_engine_read_it(name: str) -> Calibration:
    """A calibration without the driver's part: virtual devices share it, and free memory was read when it was there."""
    found = from_document(yaml.safe_load((GOLDEN / name / f"{name}.yaml").read_text()))
    metadata = found.metadata
    overhead = metadata.breakdown_gb.overhead or 0.0
    bands = tuple(
        msgspec.structs.replace(band, base_vram_gb=band.base_vram_gb - overhead, overhead_gb=None) for band in metadata.bands
    )
    breakdown = msgspec.structs.replace(metadata.breakdown_gb, overhead=0.0)
    placement = msgspec.structs.replace(metadata.placement, start_gb=None, width=WIDTHS[name])
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


def split_in_two(calibration: Calibration, kinds: str, first: float, last: float) -> Calibration:
    """With dry runs over two devices: MiB of compute with every layer there, four times less where one is not."""
    total = len(kinds) + 1
    rows = tuple(
        SetCompute(
            layers=layers, contexts=(2048, 131072), compute_gb=(tuple(size / times / 1024 for size in (first, last)),) * 2
        )
        for count, times in ((total, 1), (total - 1, 4))
        for layers in {(one, count - one) for one in (1, 2, count // 2, count - 2, count - 1)}
    )
    placement = msgspec.structs.replace(calibration.metadata.placement, set_compute=rows, layer_kinds=kinds)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, placement=placement))


def test_what_dry_runs_on_a_set_say_takes_the_place_of_the_law() -> None:
    measured = split_in_two(made_up(), "f" * 28, 300.0, 200.0)
    law, said = (judge(one, 8192, 1, (80 * GIB,) * 2) for one in (made_up(), measured))
    assert (law.source, said.source) == ("derived", "measured")
    assert [text for text in said.warnings if "calculated" in text] == []
    assert (said.uncertainty_bytes or 0) < (law.uncertainty_bytes or 0)
    by_law, by_set = ([one.required_bytes for one in verdict.devices] for verdict in (law, said))
    assert by_law[0] - by_law[1] != by_set[0] - by_set[1]
    assert judge(measured, 8192, 2, (80 * GIB,) * 2).source == "derived", "dry runs had one slot"
    assert judge(measured, 8192, 1, (80 * GIB,) * 3).source == "derived", "no dry run had a device in the middle"


@pytest.mark.parametrize(("context", "truth"), [(8192, (88.55, 79.79)), (32768, (184.55, 175.79))])
def test_a_set_that_was_calibrated_without_dry_runs_is_judged_within_its_bound(
    context: int, truth: tuple[float, float]
) -> None:
    """Artifacts from before dry runs of sets were kept: one sum of two devices, copies and all (qwen2, splits.json)."""
    placement = Placement(reserve_gb=1.0, layer_weights_gb=0.6, output_weights_gb=0.1)
    old = model(placement, 24, 0.7, (88.55 + 79.79 - 64) / 1024, 0.1)
    band = msgspec.structs.replace(old.metadata.bands[0], compute_gb_per_10k=8192 * 10_000 / GIB)
    machine = msgspec.structs.replace(old.metadata.machine, gpus=(Gpu(name="A"), Gpu(name="B")))
    old = msgspec.structs.replace(old, metadata=msgspec.structs.replace(old.metadata, bands=(band,), machine=machine))
    verdict = judge(old, context, 1, (80 * GIB,) * 2)
    assert (verdict.verdict, verdict.source) == ("fits", "derived")
    caches = 0.1 * GIB * context / 10_000
    for device, layers, compute in zip(verdict.devices, (13, 11), truth, strict=True):
        held = (0.6 * layers / 24 + 0.1 * (layers == 11)) * GIB + caches * layers / 24 + compute * MIB
        assert abs(device.required_bytes - held) <= 0.1 * compute * MIB
        assert abs(device.required_bytes - held) <= (verdict.uncertainty_bytes or 0)
    most = max(one.required_bytes + one.reserve_bytes for one in verdict.devices)
    short = judge(old, context, 1, (most, most))
    assert (short.verdict, short.tight) == ("offload", True), "no more room than predicted leaves it open"


def test_layers_on_devices_that_keep_less_than_their_margin_are_no_offload() -> None:
    """Copies of a pipeline begin with the last layer; the engine does not look again at the devices that it has filled."""
    measured = split_in_two(made_up(), "f" * 28, 900.0, 900.0)
    below = 0
    for room in range(1500, 3200, 20):
        acted = with_settings(measured, env={"LLAMA_ARG_FIT_TARGET": f"512,{8192 - room}"})
        verdict = judge(acted, 8192, 1, (8 * GIB, 8 * GIB))
        if any("less free than the margin" in text for text in verdict.warnings):
            below += 1
            assert verdict.verdict == "fits"
            assert verdict.layers_offloaded == verdict.layers_total == sum(one.layers or 0 for one in verdict.devices)
            assert verdict.devices[1].reserve_bytes < (8192 - room) * MIB
            assert all(one.required_bytes + one.reserve_bytes <= one.available_bytes for one in verdict.devices)
    assert below


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("room", [260, 320, 360])
def test_experts_that_fit_in_another_split_than_the_first_are_not_said_to_fit(room: int, measured: bool) -> None:
    """Experts come back front to back, and may stop short of all of them: false fits of qwen3moe over two devices."""
    moe = model(MOE, 12, 0.6, 0.034, 0.02)
    moe = split_in_two(moe, "f" * 12, 76.0, 76.0) if measured else moe
    acted = with_settings(moe, env={"LLAMA_ARG_FIT_TARGET": f"1024,{4096 - room}"})
    rearranged = judge(acted, 8192, 1, (4 * GIB, 4 * GIB))
    assert judge(moe, 8192, 1, (4 * GIB, 4 * GIB)).verdict == "fits"
    assert rearranged.verdict == "offload"
    assert rearranged.tight or measured


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
        assert "80% of GPU1's 24.0 GiB" in text[0]

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


RPC: dict[str, dict[str, Any]] = json.loads((GOLDEN.parent / "b11434-rpc" / "decisions.json").read_text())


@pytest.mark.parametrize("on_one", [False, True], ids=["calibrated on as many", "calibrated on one"])
@pytest.mark.parametrize("name", RPC)
def test_two_and_three_cards_are_judged_as_llama_server_decided(name: str, on_one: bool) -> None:
    """Sets of ``bench/devices.py``: what was in the server's log."""
    exact, changed = 0, 0
    for decision in RPC[name]["decisions"]:
        budgets, context, free = decision["budgets_mib"], decision["context"], RPC[name]["free_mib"]
        calibration = from_document(RPC[name]["calibrations"]["1" if on_one else str(len(budgets))])
        targets = ",".join(str(free - one) for one in budgets)
        acted = with_settings(calibration, env={"LLAMA_ARG_FIT_TARGET": targets})
        verdict = judge(acted, context, 1, (free * MIB,) * len(budgets))
        assert verdict.verdict in (("fits", "offload") if decision["full"] else ("offload",)), decision
        assert verdict.verdict == "fits" or not decision["full"] or verdict.tight, decision
        if not decision["kept"]:
            layers = [one.layers or 0 for one in verdict.devices]
            changed += 1
            exact += layers == decision["layers"]
            assert max(abs(one - true) for one, true in zip(layers, decision["layers"], strict=True)) <= 1, decision
        if verdict.verdict == "fits" and not on_one:
            for one, true in zip(verdict.devices, decision["used_mib"], strict=True):
                assert abs(one.required_bytes / MIB - true - 0.5) <= 0.5 + 0.005 * true, decision
    assert exact >= (0.9 if on_one else 0.95) * changed
