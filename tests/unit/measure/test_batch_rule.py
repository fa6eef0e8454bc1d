"""Which batches an engine will choose, and so which a calibration loads."""

from __future__ import annotations

from typing import Literal

import pytest

from harness.engines.registry import policy_of
from harness.fit.load_plan import plan_loads
from harness.options import FlashAttention


@pytest.mark.parametrize(
    ("target", "flash", "batches"),
    [
        ("gpu", "auto", {512, 1024, 2048}),
        ("gpu", "on", {512, 1024, 2048}),
        ("gpu", "off", {512}),
        ("host", "off", {512, 1024, 2048}),
    ],
)
def test_ollama_keeps_one_batch_on_nvidia_without_flash_attention(
    target: Literal["gpu", "host"], flash: FlashAttention, batches: set[int]
) -> None:
    rule = policy_of("ollama").batch_limits("0.33.0", target=target, flash_attention=flash)
    assert {load.num_batch for load in plan_loads((8192, 16384, 32768), 131_072, batch_limits=rule)} == batches


def test_slots_reach_a_larger_batch_sooner() -> None:
    rule = policy_of("ollama").batch_limits("0.33.0")
    one = {load.num_batch for load in plan_loads((8192, 16384, 32768), 32_768, batch_limits=rule)}
    four = {load.num_batch for load in plan_loads((8192, 16384, 32768), 32_768, batch_limits=rule, num_parallel=4)}
    assert (one, four) == ({512, 1024}, {512, 1024, 2048})
