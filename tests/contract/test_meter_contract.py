"""What the sampler and the workflows rely on, whichever meter reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.meters.base import Meter
from harness.meters.drm import DrmMeter
from harness.meters.host import HostMeter
from harness.meters.log import LogMeter
from harness.meters.nvml import NvmlMeter
from harness.model.trace import Reading
from tests.support.drm_tree import CARD, Tree, amdgpu
from tests.support.fake_nvml import UUID, FakeDriver, library

Make = Callable[[], Meter]


@pytest.fixture(params=["host", "log", "drm", pytest.param("nvml", marks=pytest.mark.requires("gcc"))])
def meter(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    if request.param == "nvml":
        driver = FakeDriver(library(), tmp_path / "state", monkeypatch)
        driver.holds(f"process 0 C {os.getpid()} 4096")
    tree = Tree(tmp_path)
    tree.card()
    tree.process(os.getpid(), amdgpu(1, 1 << 30))
    makers: dict[str, Make] = {
        "host": HostMeter,
        "log": LogMeter,
        "drm": lambda: DrmMeter([CARD], tree.sys, tree.proc),
        "nvml": lambda: NvmlMeter([UUID]),
    }
    meter = makers[request.param]()
    assert meter.name == request.param
    yield meter
    meter.close()


def gone() -> int:
    """The PID of a process that has ended and been waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=200)
    return process.pid


def told(reading: Reading) -> None:
    """A reading has a figure above zero or a reason, never a zero; both only where the figure is another one than asked for."""
    if reading.total_bytes is None:
        assert reading.reason
    else:
        assert reading.total_bytes > 0
        assert (reading.reason is None) == (reading.basis == "process")


def test_a_reading_is_a_figure_or_a_reason(meter: Meter) -> None:
    told(meter.read(frozenset({os.getpid()})))


@pytest.mark.parametrize("ended", [False, True], ids=["none", "ended"])
def test_an_engine_without_processes_is_unknown_not_zero(meter: Meter, ended: bool) -> None:
    reading = meter.read(frozenset({gone()} if ended else ()))
    assert reading.total_bytes is None
    assert reading.reason


def test_a_process_that_ended_does_not_spoil_the_others(meter: Meter) -> None:
    alone = meter.read(frozenset({os.getpid()}))
    both = meter.read(frozenset({os.getpid(), gone()}))
    assert (alone.total_bytes is None) == (both.total_bytes is None)


def test_the_driver_is_asked_four_times_a_second_at_most(meter: Meter) -> None:
    assert meter.interval >= (0.25 if meter.name in ("nvml", "drm") else 0.01)
