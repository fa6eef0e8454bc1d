"""What a run is worth when somebody else used the GPU, or when the GPU did not come back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from harness.errors import UntrustedError
from harness.fit.constants import fit_record
from harness.measure.interference import interference_notes, refuse_blind
from harness.model.record import Load
from harness.model.trace import MemoryTrace, Occupancy, Plateau
from harness.units import GIB
from tests.support.records import load, record

CONTEXTS = (8192, 16384, 32768)


def loads() -> list[Load]:
    return [load(context) for context in CONTEXTS]


def seen(one: Load, **changes: object) -> Load:
    return msgspec.structs.replace(one, trace=MemoryTrace(meter="nvml", **changes))  # type: ignore[arg-type]


def by_device(one: Load, left: int | None = 0) -> Load:
    """The same load, measured by the rise of the whole device."""
    assert one.busy is not None
    plateau = msgspec.structs.replace(one.busy, basis="device-delta", reason="the driver gives no memory by process (N/A)")
    return msgspec.structs.replace(one, idle=plateau, busy=plateau, left_bytes=left)


def test_another_process_that_moved_spoils_the_rise_of_a_device_alone() -> None:
    points = [by_device(one) for one in loads()]
    points[1] = seen(points[1], other_processes={99: 2 * GIB}, moved={99: GIB})
    with pytest.raises(UntrustedError, match=r"process 99 by 1,024\.0 MiB") as caught:
        fit_record(record(*points))
    assert caught.value.code == "stranger-moved"
    points = loads()
    points[1] = seen(points[1], other_processes={99: 2 * GIB}, moved={99: GIB})
    calibration = fit_record(record(*points))
    assert calibration.constants == fit_record(record(*loads())).constants
    assert any("process 99 by 1,024.0 MiB" in note for note in calibration.metadata.quality.notes)


def test_a_stranger_that_stays_as_it_is_does_not() -> None:
    assert fit_record(record(*(seen(one, other_processes={99: 2 * GIB}) for one in loads()))).constants.base_vram_gb > 0


def test_the_rise_of_a_device_is_named_as_such() -> None:
    calibration = fit_record(record(*(by_device(one) for one in loads())))
    notes = [note for note in calibration.metadata.quality.notes if "device-delta" in note]
    assert len(notes) == len(CONTEXTS)
    assert "N/A" in notes[0]


def test_the_rise_of_a_device_counts_only_where_it_comes_back() -> None:
    points = [by_device(one) for one in loads()]
    points[0] = by_device(points[0], left=GIB)
    with pytest.raises(UntrustedError) as caught:
        fit_record(record(*points))
    assert caught.value.code == "baseline-moved"


@pytest.mark.parametrize("after", [0, 2 * GIB])
def test_a_baseline_that_is_another_one_afterwards_spoils_differences_alone(after: int) -> None:
    """What an earlier program had not yet given back counts as baseline, and then goes away."""
    moved: dict[str, Any] = {"before": Occupancy(devices={"GPU-a": GIB}), "after": Occupancy(devices={"GPU-a": after})}
    with pytest.raises(UntrustedError) as caught:
        fit_record(msgspec.structs.replace(record(*(by_device(one) for one in loads())), **moved))
    assert caught.value.code == "baseline-moved"
    assert fit_record(msgspec.structs.replace(record(*loads()), **moved)).constants.base_vram_gb > 0


def test_a_meter_that_never_sees_anything_ends_the_run_with_its_reason() -> None:
    blind = Plateau(total_bytes=None, reason="the driver does not permit us to see memory by process")
    unseen = msgspec.structs.replace(loads()[0], idle=blind, busy=blind)
    with pytest.raises(UntrustedError, match="does not permit") as caught:
        refuse_blind(seen(unseen), "gpu")
    assert caught.value.code == "no-reading"
    refuse_blind(seen(unseen, peak_bytes=GIB), "gpu")  # it saw something: only this plateau is missing
    refuse_blind(seen(loads()[0]), "gpu")
    refuse_blind(seen(msgspec.structs.replace(unseen, outcome="wont-fit")), "gpu")  # nothing was there to be seen


def test_figures_by_process_survive_memory_that_does_not_come_back_with_a_note() -> None:
    points = loads()
    points[0] = msgspec.structs.replace(points[0], left_bytes=GIB)
    calibration = fit_record(record(*points))
    assert any("still held 1,024.0 MiB" in note for note in calibration.metadata.quality.notes)


def test_figures_of_two_kinds_are_not_mixed() -> None:
    points = loads()
    points[2] = by_device(points[2])
    with pytest.raises(UntrustedError) as caught:
        fit_record(record(*points))
    assert caught.value.code == "settings-differ"


def test_who_else_used_the_gpu_is_noted_with_the_time() -> None:
    run = msgspec.structs.replace(
        record(seen(load(8192), other_processes={7: None, 99: 2 * GIB})),
        before=Occupancy(processes={99: GIB}),
        after=Occupancy(processes={5: None}),
    )
    assert interference_notes(run) == (
        "another process used the GPU: process 5, an unknown size after",
        "another process used the GPU: process 7, an unknown size during",
        "another process used the GPU: process 99, 1,024.0 MiB before, 2,048.0 MiB during",
    )
