"""Placements that are asked for: where their edges lie, what is uncertain of them, and what says nothing of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from harness.engines.registry import policy_of
from harness.model.calibration import Breakdown, Calibration, SplitCompute
from harness.model.record import Tensors
from harness.prediction.forced import Forced, judge_as_asked
from harness.prediction.memory import predict
from harness.prediction.verdict import Verdict
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, with_version
from tests.support.records import WEIGHTS

LAYER, EXPERTS = 138 * MIB, 120 * MIB
HALF = Forced(gpu_layers=15)


def judged(calibration: Calibration, forced: Forced, *free: int, context: int = 8192) -> Verdict:
    rules = policy_of(calibration.engine)
    return judge_as_asked(calibration, context, 1, free or (64 * GIB,), rules, forced)


def placed(calibration: Calibration, **changes: Any) -> Calibration:
    placement = msgspec.structs.replace(calibration.metadata.placement, **changes)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, placement=placement))


def required(verdict: Verdict) -> int:
    assert verdict.required_bytes is not None
    return verdict.required_bytes


def doubt(verdict: Verdict) -> int:
    assert verdict.uncertainty_bytes is not None
    return verdict.uncertainty_bytes


@pytest.mark.parametrize("forced", [HALF, Forced(fit=False)])
def test_the_upper_end_decides_to_the_byte_and_between_both_ends_it_is_tight(forced: Forced) -> None:
    needs = judged(made_up(), forced)
    size, off = required(needs), doubt(needs)
    assert off > MIB
    edges = {off: ("fits", False, False), off - 1: ("offload", True, True), 0: ("offload", True, True),
             -off: ("offload", True, True), -off - 1: ("offload", False, True)}  # fmt: skip
    for margin, answer in edges.items():
        found = judged(made_up(), forced, size + margin)
        assert (found.verdict, found.tight, found.out_of_memory) == answer, margin
        assert ((found.max_context or 0) >= 8192) is (margin >= off), "what is said to fit fits when it is asked about"


def test_what_is_uncertain_of_a_split_goes_with_what_was_seen_of_it() -> None:
    """Without a dry run the cache of one more layer; with one 5 % of its compute; and of layers known by their mean, one."""
    one, needed = made_up(), predict(made_up(), 8192)
    cache = (needed.context_cache_bytes or 0) + (needed.fixed_cache_bytes or 0)
    assert doubt(judged(one, HALF)) == pytest.approx(needed.uncertainty_bytes + cache / 28, abs=2)
    seen = placed(one, split_compute=(SplitCompute(layers=15, context=8192, compute_gb=0.25),))
    assert doubt(judged(seen, HALF)) == pytest.approx(needed.uncertainty_bytes + 0.05 * 0.25 * GIB, abs=2)
    mean = placed(seen, layers_gb=())
    assert doubt(judged(mean, HALF)) == pytest.approx(doubt(judged(seen, HALF)) + LAYER, rel=0.01)
    assert doubt(judged(mean, Forced(fit=False))) == needed.uncertainty_bytes, "all layers are no split"


def test_layers_and_experts_on_the_host_take_the_larger_compute_of_both() -> None:
    tensors = Tensors(
        layer_bytes=(LAYER,) * 28, output_bytes=WEIGHTS - 28 * LAYER, embedding_bytes=0, expert_bytes=(EXPERTS,) * 28,
        expert_use=0.25,
    )  # fmt: skip
    for split, without in ((0.25, 0.5), (0.5, 0.25)):
        grid = (
            SplitCompute(layers=15, context=8192, compute_gb=split),
            SplitCompute(layers=29, context=8192, compute_gb=without, experts_on_host=True),
        )
        one = placed(made_up(tensors=tensors), split_compute=grid)
        layers, both = judged(one, HALF), judged(one, Forced(gpu_layers=15, cpu_moe=28))
        assert (layers.layers_overflowing, both.layers_overflowing) == (0, 14)
        more = (max(without, split) - split) * GIB
        assert required(both) - required(layers) == pytest.approx(more - 14 * EXPERTS, abs=2 * MIB)


def test_forced_layers_over_several_devices_are_not_calculated() -> None:
    found = judged(made_up(), HALF, 24 * GIB, 24 * GIB)
    assert (found.verdict, "forced layers over 2 devices are not calculated" in (found.reason or "")) == ("unknown", True)


def test_a_reserve_says_nothing_of_an_engine_that_decides_it_by_itself() -> None:
    made = msgspec.structs.replace(with_version(made_up(), "0.12.11"), engine="ollama", id="ollama/made-up")
    found = judged(made, Forced(reserve=GIB), 24 * GIB)
    assert (found.verdict, found.reason) == ("unknown", "--reserve: Ollama 0.12.11 decides what it keeps free")


def test_of_layers_of_unknown_size_all_or_nothing_is_known() -> None:
    made = made_up()
    parts = Breakdown(weights=None, fixed_cache=None, compute=None, overhead=None)
    without_number = msgspec.structs.replace(made.metadata.model, layers=None)
    for changes, layers in (({"breakdown_gb": parts}, 29), ({"model": without_number}, 1)):
        one = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, **changes))
        whole = judged(one, Forced(fit=False))
        assert (whole.verdict, whole.layers_total, whole.layers_offloaded) == ("fits", layers, layers)
        assert required(whole) == predict(one, 8192).total_bytes
        part = judged(one, HALF)
        assert (part.verdict, "size of each layer is unknown" in (part.reason or "")) == ("unknown", True)
