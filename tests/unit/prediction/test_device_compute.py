"""Compute of each of two devices, against every split that an engine was asked about (llama-fit-params b11434, u = 512)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.model.calibration import SetCompute
from harness.prediction.device_compute import LAYOUTS, DeviceCompute, plan_sets
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
        found[tuple(map(DevicePart, split["layers"], without))] = split["compute_mib"]
    return found


@pytest.mark.parametrize("name", ALL)
def test_the_splits_that_are_planned_tell_all_the_others(name: str) -> None:
    known, moe = ALL[name], "moe" in name
    truth = layouts(known)
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
                assert size - less - 0.01 * MIB <= (true or 0.0) * MIB <= size + 0.01 * MIB, (layout, context)
                assert less == 0 or name != "lfm2", "no split of the hybrid model is without its like"


def test_between_two_contexts_compute_is_never_said_to_be_less() -> None:
    known = ALL["lfm2"]
    row = SetCompute(layers=(9, 8), contexts=(8192, 32768), compute_gb=((0.1, 0.1), (0.2, 0.4)))
    sizes = [
        DeviceCompute([row], known["kinds"], context, moe=False).of((DevicePart(9), DevicePart(8)))
        for context in (2048, 8192, 20480)
    ]
    assert [[round(size / MIB) for size, _ in one or []] for one in sizes] == [[102, 102], [102, 102], [154, 256]]


def test_a_set_that_was_never_asked_about_tells_nothing() -> None:
    row = SetCompute(layers=(9, 8), contexts=(8192,), compute_gb=((0.1, 0.1),))
    spilled = (DevicePart(4), DevicePart(4))
    assert DeviceCompute([row], "f" * 16, 8192, moe=False).of(spilled) is None
    assert DeviceCompute([], "f" * 16, 8192, moe=False).of((DevicePart(9), DevicePart(8))) is None
