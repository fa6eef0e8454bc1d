"""Where a CUDA engine put the layers of an 8B model over one, two and four devices of an H100, and where the rule puts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.prediction.layout import Layout, default_split, fit, pipelined

GOLDEN = Path(__file__).parents[2] / "golden" / "llama-server" / "b11434-cuda-h100"
DECISIONS = [one for one in json.loads((GOLDEN / "decisions.json").read_text()) if one["model"] == "mid-8b"]
TOTAL = 33
#: MiB, from the logs beside: a layer's weights, its cache at 32,768 tokens, the output part.
LAYER, CACHE, OUTPUT = 117.03, 128.0, 281.81
TARGET = 1024


def memory(layout: Layout) -> list[float]:
    """What each device holds, MiB; compute buffers as the engine logged them."""
    placed = sum(part.layers for part in layout)
    held = []
    for device, part in enumerate(layout):
        last = bool(part.layers) and not any(other.layers for other in layout[device + 1 :])
        size = (part.layers - last) * (LAYER + CACHE) + last * OUTPUT
        if placed < TOTAL:
            compute = 200.0 if device == 0 else 132.01  # the first device computes for the layers on the host
        elif pipelined(layout, TOTAL):
            compute = 340.05 if device == 0 else 300.04  # four copies of the inputs
        else:
            compute = 148.01
        held.append(size + (compute if part.layers or (device == 0 and placed < TOTAL) else 0.0))
    return held


@pytest.mark.parametrize("one", DECISIONS, ids=lambda one: f"{one['devices']}-{one['free_mib'][0]}")
def test_layers_lie_where_the_engine_put_them(one: dict[str, Any]) -> None:
    free = one["free_mib"]
    first = default_split(TOTAL, free)
    found = fit(first, [size - TARGET for size in free], memory, experts=False)
    if one["unchanged"]:
        assert found == first
        return
    assert [part.layers for part in found] == [layers for layers, _, _ in one["layers"]]
    for said, (layers, _, used) in zip(memory(found), one["layers"], strict=True):
        assert layers < 3 or said == pytest.approx(used, abs=2)
