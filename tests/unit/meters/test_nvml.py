"""What harness makes of the driver's answers: nvidia-ml-py is the real one, the library below it is ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import NotFoundError, UnavailableError, UntrustedError
from harness.meters.nvml import NvmlMeter, free_bytes, gpus
from tests.support.fake_nvml import GIB, OTHER, UUID, FakeDriver, compile_library, library

pytestmark = pytest.mark.requires("gcc")
ENGINE = frozenset({4711, 4712})
COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v3"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(library(), tmp_path / "state", monkeypatch)


@pytest.fixture
def meter(driver: FakeDriver) -> Iterator[NvmlMeter]:
    meter = NvmlMeter([UUID, OTHER])
    yield meter
    meter.close()


def test_inventory_and_free_memory(driver: FakeDriver) -> None:
    found = gpus()
    assert [(gpu.key, gpu.uuid, gpu.name, gpu.total_bytes, gpu.driver) for gpu in found] == [
        ("0", UUID, "NVIDIA Test A", 24 * GIB, "580.95.05"),
        ("1", OTHER, "NVIDIA Test B", 24 * GIB, "580.95.05"),
    ]
    assert free_bytes(UUID) == 23 * GIB


def test_unified_memory_has_no_size_and_what_the_machine_has_left(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.meters.nvml.machine_available", lambda: 90 * GIB)
    driver.holds("fail nvmlDeviceGetMemoryInfo 3")
    assert [(gpu.total_bytes, gpu.free_bytes, gpu.shared) for gpu in gpus()] == [(None, 90 * GIB, True)] * 2
    assert free_bytes(UUID) == 90 * GIB
    driver.holds("fail nvmlDeviceGetMemoryInfo 999")
    assert [(gpu.total_bytes, gpu.free_bytes, gpu.shared) for gpu in gpus()] == [(None, None, False)] * 2


def test_processes_are_added_over_gpus_and_growth_is_seen(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.holds("process 0 C 4711 100", "process 1 C 4711 30", "process 1 C 4712 7")
    assert (meter.read(ENGINE).total_bytes, meter.read(ENGINE).devices) == (137, {UUID: 100, OTHER: 37})
    driver.holds("process 0 C 4711 200", "process 1 C 4711 30", "process 1 C 4712 7")
    assert meter.read(ENGINE).total_bytes == 237


@pytest.mark.parametrize("other", ["G", "M"])
def test_a_process_in_two_lists_counts_once(driver: FakeDriver, meter: NvmlMeter, other: str) -> None:
    driver.holds("process 0 C 4711 100", f"process 0 {other} 4711 100")
    assert meter.read(ENGINE).total_bytes == 100


def test_another_user_of_the_gpu_is_named_and_not_counted(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.holds("process 0 C 4711 100")
    assert meter.read(ENGINE).other_processes == {}
    driver.holds("process 0 C 4711 100", "process 0 G 99 5", "process 0 C 100 NA")
    reading = meter.read(ENGINE)
    assert (reading.total_bytes, reading.other_processes) == (100, {99: 5, 100: None})


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("process 0 C 4711 NA", "N/A"),
        ("process 0 C 4711 0", "0 bytes"),
        ("", "names no process"),
        ("process 0 C 99 5", "pid: host"),
        (f"process 0 C {os.getpid()} 5", "none of the engine's processes"),
        (f"process 0 C 4711 100\nprocess 0 C {1 << 22} 2131", "makes no sense"),
        (f"fail {COMPUTE} 3", "does not support"),
        (f"fail {COMPUTE} 4", "does not permit"),
        (f"fail {COMPUTE} 7", "kept growing"),
    ],
)
def test_what_cannot_be_read_is_unknown_with_its_own_reason(
    driver: FakeDriver, meter: NvmlMeter, state: str, reason: str
) -> None:
    driver.holds(state)
    reading = meter.read(ENGINE)
    assert reading.total_bytes is None
    assert reason in (reading.reason or "")


def test_where_processes_have_no_figure_the_device_s_own_rise_is_named_as_such(driver: FakeDriver) -> None:
    """WSL2 (an empty list), N/A, 0 bytes, not supported, not permitted."""
    meter = NvmlMeter([UUID])
    driver.holds(used=GIB)
    meter.take_baseline()
    for state in ("", "process 0 C 4711 NA", "process 0 C 4711 0", f"fail {COMPUTE} 3", f"fail {COMPUTE} 4"):
        driver.holds(state, used=3 * GIB)
        reading = meter.read(ENGINE)
        assert (reading.total_bytes, reading.basis, reading.devices) == (2 * GIB, "device-delta", {UUID: 2 * GIB})
        assert reading.reason, "why there is no figure by process"
        driver.holds(state, used=GIB)
        assert meter.read(ENGINE).total_bytes is None, "nothing rose: unknown, not 0"
    meter.close()


@pytest.mark.parametrize("other", ["process 0 C 99 NA", "process 0 G 99 5"])
def test_beside_a_stranger_the_device_s_rise_is_nobody_s(driver: FakeDriver, meter: NvmlMeter, other: str) -> None:
    meter.take_baseline()
    driver.holds("process 0 C 4711 NA", other, used=3 * GIB)
    reading = meter.read(ENGINE)
    assert reading.total_bytes is None
    assert reading.other_processes.keys() == {99}


def test_without_a_baseline_there_is_no_rise(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.holds("process 0 C 4711 NA", used=3 * GIB)
    assert meter.read(ENGINE).total_bytes is None
    assert meter.peek() is None


def test_the_device_as_a_whole_is_seen_between_the_readings(driver: FakeDriver, meter: NvmlMeter) -> None:
    before = meter.take_baseline()
    driver.holds("process 0 C 4711 100", "process 1 G 4711 5", used=2 * GIB)
    assert (before.devices, before.processes) == ({UUID: GIB, OTHER: 0}, {})
    assert meter.risen() == {UUID: GIB, OTHER: 0}
    assert meter.peek() == GIB
    assert meter.occupancy().processes == {4711: 105}
    driver.holds(used=GIB // 2)
    assert meter.risen() == {UUID: 0, OTHER: 0}, "freed memory of others is no negative use"


def test_on_unified_memory_processes_are_read_and_devices_are_unknown(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.holds("process 0 C 4711 100", "fail nvmlDeviceGetMemoryInfo 3")
    assert meter.take_baseline().devices == {}
    assert meter.peek() is None
    assert meter.read(ENGINE).total_bytes == 100


def test_an_instance_of_a_split_gpu_is_a_gpu_of_its_own(driver: FakeDriver) -> None:
    split = [f"mig 0 MIG-aaaa {10 * GIB} 0 NVIDIA Test A MIG 3g.10gb", f"mig 0 MIG-bbbb {5 * GIB} 0 NVIDIA Test A MIG 1g.5gb"]
    driver.holds(*split, "process 2 C 4711 100", "process 3 C 99 7")
    assert [(gpu.key, gpu.uuid, gpu.total_bytes, gpu.mig) for gpu in gpus()] == [
        ("0", "MIG-aaaa", 10 * GIB, True),
        ("0", "MIG-bbbb", 5 * GIB, True),
        ("1", OTHER, 24 * GIB, False),
    ]
    meter = NvmlMeter(["MIG-aaaa"])
    reading = meter.read(ENGINE)
    meter.close()
    assert (reading.total_bytes, reading.other_processes) == (100, {}), "other instances are other machines"


def test_the_driver_s_own_accounting_is_read_where_it_is_on(driver: FakeDriver, meter: NvmlMeter) -> None:
    assert meter.accounted(ENGINE) is None
    driver.holds("account 0 4711 500", "account 1 4711 20", "account 0 99 9999")
    assert meter.accounted(ENGINE) == 520
    driver.holds("account 0 4711 500", "fail nvmlDeviceGetAccountingMode 3")
    assert meter.accounted(ENGINE) is None


def test_one_process_without_a_figure_leaves_no_partial_sum(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.holds("process 0 C 4711 100", "process 1 C 4712 NA")
    assert meter.read(ENGINE).total_bytes is None


@pytest.mark.parametrize("code", [15, 16])
def test_a_lost_gpu_voids_the_run(driver: FakeDriver, meter: NvmlMeter, code: int) -> None:
    meter.take_baseline()
    driver.holds("process 0 C 4711 100", f"fail {COMPUTE} {code}")
    with pytest.raises(UntrustedError, match="lost"):
        meter.read(ENGINE)
    driver.holds("process 0 C 4711 100", f"fail nvmlDeviceGetMemoryInfo {code}")
    with pytest.raises(UntrustedError, match="lost"):
        meter.peek()


def test_a_list_that_grows_while_it_is_read_is_read_again(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.holds("process 0 C 4711 100", "growing 1")
    assert meter.read(ENGINE).total_bytes == 100


def test_a_driver_that_goes_away_mid_run_is_no_reading(driver: FakeDriver, meter: NvmlMeter) -> None:
    driver.unload()
    reading = meter.read(ENGINE)
    assert reading.total_bytes is None
    assert "does not answer" in (reading.reason or "")


@pytest.mark.parametrize("call", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2"])
def test_a_driver_that_stops_answering_after_its_start_is_unavailable(driver: FakeDriver, call: str) -> None:
    driver.holds(f"fail {call} 999")
    with pytest.raises(UnavailableError):
        gpus()


def test_no_driver_and_no_such_gpu_are_told_apart(driver: FakeDriver) -> None:
    with pytest.raises(NotFoundError):
        NvmlMeter(["GPU-unknown"])
    with pytest.raises(NotFoundError):
        free_bytes("GPU-unknown")
    driver.unload()
    with pytest.raises(UnavailableError):
        gpus()


def test_a_driver_before_510_is_asked_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(compile_library(tmp_path, "-DBEFORE_510"), tmp_path / "state", monkeypatch)
    driver.holds("process 0 C 4711 100", "process 0 G 4711 100")
    meter = NvmlMeter([UUID])
    try:
        assert meter.read(ENGINE).total_bytes == 100
    finally:
        meter.close()
