"""What harness takes for granted of an NVIDIA driver, on a real one (``HARNESS_REQUIRE=gpu`` where there must be one).

The figures that nothing here fixes (how large a context is, how long a reading takes) are what ``make test-gpu`` reports.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.meters.nvml import NvmlMeter, gpus
from harness.units import GIB, MIB
from tests.gpu.cuda import Cuda
from tests.gpu.driver import Driver
from tests.support.waiting import until

pytestmark = pytest.mark.requires("gpu")
#: What the driver hands out at least.
GRAIN = 2 * MIB


@pytest.fixture
def process() -> Iterator[Cuda]:
    with Cuda() as one:
        one("context")
        yield one


@pytest.fixture
def meter() -> Iterator[NvmlMeter]:
    opened = NvmlMeter([str(gpus()[0].uuid)])
    opened.take_baseline()
    yield opened
    opened.close()


def held(meter: NvmlMeter, *processes: Cuda) -> int:
    reading = meter.read(frozenset(one.pid for one in processes))
    assert reading.basis == "process", reading.reason
    return reading.total_bytes or 0


def test_what_a_process_allocates_is_what_its_figure_grows_by(process: Cuda, meter: NvmlMeter) -> None:
    context = held(meter, process)
    process(f"alloc {GIB}")
    assert held(meter, process) - context == GIB
    process(f"alloc {GIB // 2 + 1}")
    assert held(meter, process) - context == GIB + GIB // 2 + GRAIN
    process("free")
    assert held(meter, process) == context


def test_two_processes_are_told_apart(process: Cuda, meter: NvmlMeter) -> None:
    alone = held(meter, process)
    with Cuda() as other:
        other("context")
        other(f"alloc {3 * GIB}")
        assert held(meter, process) == alone
        assert held(meter, other) - 3 * GIB == alone
        assert meter.read(frozenset({process.pid})).other_processes == {other.pid: alone + 3 * GIB}


def test_the_device_as_a_whole_rises_by_little_more_than_the_processes_say(meter: NvmlMeter) -> None:
    with Cuda() as one:
        one("context")
        one(f"alloc {GIB}")
        assert 0 <= (meter.peek() or 0) - held(meter, one) < 32 * MIB


@pytest.mark.parametrize("kill", [False, True], ids=["exit", "kill"])
def test_memory_comes_back_after_the_process(kill: bool, meter: NvmlMeter) -> None:
    with Cuda() as one:
        one("context")
        one(f"alloc {GIB}")
        pid = one.pid
        one.end(kill=kill)
        until(lambda: (meter.peek() or 0) <= 16 * MIB, "the memory of a process that has ended", limit=10)
        with Driver() as driver:
            assert pid not in driver.processes(0)


def test_the_free_memory_that_an_engine_sees_is_the_drivers(process: Cuda) -> None:
    with Driver() as driver:
        seen = process("info")
        memory = driver.memory(0)
        assert abs(seen["free"] - memory["free"]) <= 4 * MIB
        assert memory["total"] - seen["total"] <= 2 * GIB, (
            "what the driver keeps for itself is in one total and not in the other"
        )
