"""Compute of each of several devices, against every split that llama-server b11434 was asked about (u = 512)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.model.calibration import SetCompute
from harness.prediction.device_compute import LAYOUTS, DeviceCompute, OneDevice, Spot, by_law, plan_sets, spots
from harness.prediction.layout import DevicePart, Layout
from harness.units import MIB, gib

ALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "llama-server" / "b11434-rpc" / "splits.json").read_text()
)


def layouts(known: dict[str, Any]) -> dict[Layout, list[list[float | None]]]:
    """Every split that was asked, with MiB of each device at each context."""
    found = {}
    for split in known["splits"]:
        last = max(index for index, layers in enumerate(split["layers"]) if layers)
        without = [(layers - (index == last)) * known["experts_on_host"] for index, layers in enumerate(split["layers"])]
        found[tuple(map(DevicePart, split["layers"], split.get("partial", without)))] = split["compute_mib"]
    return found


#: Models of which all splits over two devices were asked about.
WHOLE = ("lfm2", "qwen3moe", "qwen3moe, experts on the host")


@pytest.mark.parametrize("name", ALL)
def test_devices_of_which_all_is_equal_hold_the_same(name: str) -> None:
    known = ALL[name]
    found: dict[Spot, set[tuple[float, ...]]] = {}
    for layout, sizes in layouts(known).items():
        for index, spot in enumerate(spots(known["kinds"], layout, moe="moe" in name)):
            if spot is not None:
                found.setdefault(spot, set()).add(tuple(one[index] or 0.0 for one in sizes))
    for spot, figures in found.items():
        for one in zip(*figures, strict=True):
            assert max(one) - min(one) <= 0.011, spot


@pytest.mark.parametrize("name", WHOLE)
def test_the_splits_that_are_planned_tell_all_the_others(name: str) -> None:
    known, moe = ALL[name], "moe" in name
    # With experts the engine leaves no layer to the host that keeps them (common/fit.cpp).
    left = {layout: len(known["kinds"]) + 1 - sum(part.layers for part in layout) for layout in layouts(known)}
    usual = {layout for layout, some in left.items() if name != "qwen3moe" or not some}
    truth = {layout: sizes for layout, sizes in layouts(known).items() if len(layout) == 2 and layout in usual}
    planned = [layout for layout in plan_sets(known["kinds"], 2, moe=moe) if layout in truth]
    assert len(planned) <= LAYOUTS < len(truth) or moe
    rows = [
        SetCompute(
            layers=tuple(part.layers for part in layout),
            partial=tuple(part.partial for part in layout),
            contexts=tuple(known["contexts"]),
            compute_gb=tuple(tuple(gib((one or 0.0) * MIB) for one in sizes) for sizes in truth[layout]),
        )
        for layout in planned
    ]
    for number, context in enumerate(known["contexts"]):
        compute = DeviceCompute(rows, known["kinds"], context, moe=moe)
        for layout, sizes in truth.items():
            said = compute.of(layout)
            assert said is not None
            for (size, less), true in zip(said, sizes[number], strict=True):
                assert abs((true or 0.0) * MIB - size) <= less + 0.01 * MIB, (layout, context)
                assert less == 0 or name != "lfm2", "no split of the hybrid model is without its like"


@pytest.mark.parametrize("known_width", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_what_follows_from_one_device_is_within_its_bound_on_several(name: str, known_width: bool) -> None:
    """Nothing takes more than was said; with the width of the model known, nothing takes less either."""
    known = ALL[name]
    contexts, (low, high) = known["contexts"], known["one_mib"]
    alone = {sum(split["layers"]): split["compute_mib"] for split in known["splits"] if split["layers"][1:] == [0]}
    for at, context in enumerate(contexts):
        one = OneDevice(
            full=known["one_mib"][at] * MIB,
            growing=(high - low) / (contexts[1] - contexts[0]) * context * MIB,
            mask=2.0 * known["batch"] * context,
            window_mask=2.0 * known["batch"] * 1024 * ("w" in known["kinds"]),
            hidden=4.0 * known["batch"] * known["width"] if known_width else None,
        )
        for layout, sizes in layouts(known).items():
            host = alone.get(sum(part.layers for part in layout), [[one] for one in [*known["host_mib"].values()][-1]])
            begin = host[at][0] * MIB
            for (said, off), true in zip(by_law(known["kinds"], layout, one, begin), sizes[at], strict=True):
                assert (true or 0.0) * MIB <= said + off + 0.02 * MIB, (layout, context)
                assert (true or 0.0) * MIB >= said - off or not known_width, (layout, context)


@pytest.mark.parametrize("context", range(1024, 131_072 + 1, 5120))
def test_between_two_contexts_the_largest_of_two_graphs_is_within_what_is_said(context: int) -> None:
    """One graph does not grow, the other by 8 KiB a token: they meet between two dry runs."""

    def truth(cells: int) -> float:
        return max(64.0, cells / 128 - 200.0)

    contexts = (2048, 8192, 32768, 65536, 131_072)
    rows = tuple(tuple(gib(truth(one) * MIB) for _ in range(2)) for one in contexts)
    known = DeviceCompute([SetCompute(layers=(9, 8), contexts=contexts, compute_gb=rows)], "f" * 16, context, moe=False)
    for size, off in known.of((DevicePart(9), DevicePart(8))) or [(0.0, 0.0)]:
        assert size / MIB == pytest.approx(truth(context), abs=0.01)
        assert truth(context) <= (size + off) / MIB + 0.01


def test_a_set_that_was_never_asked_about_tells_nothing() -> None:
    row = SetCompute(layers=(9, 8), contexts=(8192,), compute_gb=((0.1, 0.1),))
    spilled = (DevicePart(4), DevicePart(4))
    assert DeviceCompute([row], "f" * 16, 8192, moe=False).of(spilled) is None
    assert DeviceCompute([], "f" * 16, 8192, moe=False).of((DevicePart(9), DevicePart(8))) is None
