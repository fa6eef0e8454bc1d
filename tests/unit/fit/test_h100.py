"""Calibrations of a real H100, and what the engine then did there with less and less free memory."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from harness.errors import UntrustedError
from harness.fit.constants import fit_record, overhead_spread
from harness.fit.observations import allowed_spread, points_of
from harness.model.calibration import Calibration
from harness.model.record import Load, Record
from harness.model.trace import Plateau
from harness.prediction.memory import predict
from harness.store.store import read_record
from harness.units import GIB, MIB
from tests.support.records import load, record
from tests.support.rules import judge

GOLDEN = Path(__file__).parents[2] / "golden" / "llama-server" / "b11434-cuda-h100"
CARDS = json.loads((GOLDEN / "cards.json").read_text())


def run(name: str) -> Record:
    return read_record(GOLDEN / name / "record.json")


@pytest.fixture(scope="module")
def calibrations() -> dict[str, Calibration]:
    return {name: fit_record(run(name)) for name in ("small-1b", "mid-8b", "moe")}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card['model']}-{card['free_bytes'] // MIB}")
def test_a_verdict_is_what_the_engine_does(card: dict[str, object], calibrations: dict[str, Calibration]) -> None:
    """Free memory up to 0.06 % from the edge; layers to the one, speeds to a third."""
    verdict = judge(calibrations[str(card["model"])], int(str(card["context"])), 1, (int(str(card["free_bytes"])),))
    assert verdict.tight or (verdict.verdict == "fits") == card["fully"]
    if verdict.verdict == "offload" and not card["fully"]:
        assert verdict.layers_offloaded == card["layers"]
        assert card["overflowing"] in (None, verdict.layers_overflowing)
    if card["model"] == "moe":
        assert verdict.decode_tokens_per_s is None, "its repeats differed by 38 %"
    else:
        assert verdict.decode_tokens_per_s == pytest.approx(card["decode_tokens_per_s"], rel=0.34)


def test_what_comes_after_the_decision_is_taken_from_the_reserve(calibrations: dict[str, Calibration]) -> None:
    """527 MiB are gone when the engine reads what is free; the workspaces for F16 come on top."""
    for name, later in (("mid-8b", 74), ("small-1b", 170), ("moe", 172)):
        verdict = judge(calibrations[name], 8192, 1, (1 << 40,))
        assert verdict.reserve_bytes == pytest.approx((1024 - later) * MIB, abs=MIB)
    unknown = msgspec.structs.replace(calibrations["mid-8b"].metadata.placement, start_gb=None)
    metadata = msgspec.structs.replace(calibrations["mid-8b"].metadata, placement=unknown)
    assert (
        judge(msgspec.structs.replace(calibrations["mid-8b"], metadata=metadata), 8192, 1, (1 << 40,)).reserve_bytes == 1 << 30
    )


@pytest.mark.parametrize(("name", "spread", "refused"), [("small-1b-batches", 30, True), ("mid-8b-batches", 20, False)])
def test_overheads_are_compared_within_a_batch(name: str, spread: float, refused: bool) -> None:
    points, _ = points_of(run(name))
    busy = [point.overhead or 0 for point in points]
    apart = max(busy) - min(busy)
    assert apart / MIB == pytest.approx(spread, abs=0.1), "from batch to batch they differ"
    assert (apart > allowed_spread(max(point.total for point in points))) == refused, "by more than one batch may"
    assert (overhead_spread(points) or 0) / MIB == pytest.approx(0.04, abs=0.01), "within a batch, and before a prompt, not"
    assert fit_record(run(name)).metadata.quality.overhead_spread_gb == pytest.approx(0.04 / 1024, abs=1e-5)


def test_each_band_has_the_overhead_of_its_batch() -> None:
    calibration = fit_record(run("mid-8b-batches"))
    for point in points_of(run("mid-8b-batches"))[0]:
        found = predict(calibration, point.context, num_batch=point.num_batch)
        if point.num_batch != 1024:  # loaded once, and not the batch of any context
            assert found.overhead_bytes == pytest.approx(point.overhead, abs=0.1 * MIB)
            assert found.total_bytes == pytest.approx(point.total, rel=1e-3)


def test_a_batch_whose_workspaces_are_above_those_of_a_larger_one_is_refused() -> None:
    loads = [load(8192), load(32768), load(8192, 1024), load(32768, 1024)]
    assert fit_record(record(*loads)) is not None
    loads[:2] = [busy(one, 30 * MIB) for one in loads[:2]]
    with pytest.raises(UntrustedError) as caught:
        fit_record(record(*loads))
    assert caught.value.code == "overhead-moves"


def busy(one: Load, more: int, **changes: object) -> Load:
    """A load whose memory grew by ``more`` with its prompt."""
    assert one.busy is not None
    plateau = Plateau(total_bytes=(one.busy.total_bytes or 0) + more, spread_bytes=0, readings=5)
    return msgspec.structs.replace(one, busy=plateau, **changes)


def test_without_flash_attention_twice_the_largest_context_is_predicted() -> None:
    """65,536 tokens, all of them filled, were measured: 11,374 MiB. Beyond the loads it is an extrapolation all the same."""
    calibration = fit_record(run("small-1b-unfused"))
    found = predict(calibration, 65_536)
    assert found.total_bytes / MIB == pytest.approx(11_374, rel=0.002)
    assert calibration.metadata.quality.valid_to == 32_768
    assert any("pool grows with the prompt" in note for note in calibration.metadata.quality.notes)
    logged = [load.facts for load in run("small-1b-unfused").loads if load.request.purpose == "point"]
    slope = calibration.constants.compute_gb_per_10k * GIB / 10_000
    told = [sum(facts.total(part, "gpu") or 0 for part in ("compute_bytes",)) for facts in logged if facts]
    assert slope - (told[-1] - told[0]) / 24_576 == pytest.approx(2 * 32 * 512, rel=0.05), "what no log tells"


#: Overheads of the 1B model without flash attention after prompts that filled the context: u = 512, 32 heads; tokens, MiB.
FILLED = ((8128, 932.73), (16_320, 1188.73), (32_704, 1700.73))


def without_flash_attention(*filled: tuple[int, float]) -> Record:
    loads = []
    for tokens, overhead in filled:
        context = -(-tokens // 256) * 256
        one = load(context, overhead=round(586.73 * MIB), flash_attention="disabled")
        loads.append(busy(one, round((overhead - 586.73) * MIB), prompt_tokens=tokens))
    return record(*loads)


def test_without_flash_attention_the_pool_grows_with_the_prompt_and_counts_as_compute() -> None:
    calibration = fit_record(without_flash_attention(*FILLED))
    for tokens, overhead in FILLED:
        context = -(-tokens // 256) * 256
        plain = fit_record(record(*(load(c, overhead=0, flash_attention="disabled") for c in (8192, 16384, 32768))))
        expected = predict(plain, context).total_bytes + overhead * MIB
        assert predict(calibration, context).total_bytes == pytest.approx(expected, abs=3 * MIB)
    assert calibration.metadata.quality.max_error == pytest.approx(0, abs=1e-4)


def test_a_prompt_that_did_not_fill_the_context_is_extrapolated_to_all_of_it() -> None:
    """The longest prompt has 32,768 tokens; the pool goes on growing by ``2*heads*u`` bytes a token."""
    short = without_flash_attention(*FILLED[:2])
    far = load(131_072, overhead=round(586.73 * MIB), flash_attention="disabled")
    loads = (*short.loads, busy(far, round((1700.73 - 586.73) * MIB), prompt_tokens=32_704))
    more = (
        predict(fit_record(record(*loads)), 131_072).total_bytes
        - predict(fit_record(without_flash_attention(*FILLED)), 131_072).total_bytes
    )
    assert more == pytest.approx(0, abs=3 * MIB)
