"""The sampler's plateaus and its trace, on a meter that a test writes down; no time passes."""

from __future__ import annotations

import threading

import pytest

from harness.errors import UntrustedError
from harness.meters.sampler import Sampler, next_deadline, steady_stretch, thin
from harness.model.trace import MemoryTrace, MeterName, Occupancy, Reading, Sample
from harness.units import GIB, MIB


def known(*sizes: int | None) -> list[Reading]:
    return [Reading(total_bytes=size, reason=None if size is not None else "N/A") for size in sizes]


class Script:
    """A meter that reads off a list, then repeats its last reading; an exception in it is raised."""

    name: MeterName = "nvml"
    interval = 0.001

    def __init__(self, *steps: Reading | Exception) -> None:
        self._steps = list(steps)

    def read(self, pids: frozenset[int]) -> Reading:
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        pass


def sampler(*steps: Reading | Exception) -> Sampler:
    return Sampler(Script(*steps), lambda: frozenset({1}))


def test_memory_still_growing_is_no_plateau() -> None:
    assert steady_stretch(known(0, 2 * MIB, 4 * MIB), 3, MIB) is None
    assert steady_stretch(known(4, 4), 3, MIB) is None


def test_a_reading_that_failed_breaks_a_plateau() -> None:
    assert steady_stretch(known(4, None, 4), 3, MIB) is None


def test_a_plateau_is_the_median_of_its_last_readings_with_their_spread() -> None:
    found = steady_stretch(known(9 * MIB, 100, 104, 102), 3, MIB)
    assert found is not None
    assert (found.total_bytes, found.spread_bytes, found.readings) == (102, 4, 3)


def test_the_peak_is_over_every_reading_and_failures_are_counted() -> None:
    subject = sampler(*known(5, 50, None, None, 7))
    for _ in range(5):
        subject.read_once()
    trace = subject.stop()
    assert (trace.peak_bytes, trace.readings, trace.failures) == (50, 5, {"N/A": 2})


def trace_of(*readings: Reading, pids: tuple[set[int], ...] = (), exists: bool = True) -> MemoryTrace:
    """The trace of these readings; ``pids`` are the engine's processes at each, {1} where they are not given."""
    families = [*pids, *[{1}] * (len(readings) - len(pids))]
    subject = Sampler(Script(*readings), lambda: frozenset(families.pop(0)), exists=lambda _: exists)
    for _ in readings:
        subject.read_once()
    return subject.stop()


def beside(**other_processes: int | None) -> Reading:
    """A reading with other processes on the GPU: ``p99=5``."""
    return Reading(total_bytes=1, other_processes={int(name[1:]): size for name, size in other_processes.items()})


def test_a_stranger_is_kept_at_its_largest() -> None:
    trace = trace_of(beside(p99=30), beside(p99=70, p100=None), beside(p99=30, p100=None))
    assert trace.other_processes == {99: 70, 100: None}


def test_a_child_that_the_meter_saw_before_us_is_no_stranger() -> None:
    trace = trace_of(beside(p2=5 * GIB), beside(), pids=({1}, {1, 2}))
    assert (trace.other_processes, trace.moved) == ({}, {})


@pytest.mark.parametrize(("exists", "other_processes"), [(True, {2: GIB}), (False, {})])
def test_a_pid_that_was_ours_is_a_stranger_s_only_if_it_was_given_out_again(
    exists: bool, other_processes: dict[int, int]
) -> None:
    """The driver may name a process that has just ended a little longer."""
    trace = trace_of(beside(), beside(p2=GIB), beside(p2=GIB), pids=({1, 2}, {1}, {1}), exists=exists)
    assert (trace.other_processes, trace.moved) == (other_processes, other_processes)


def test_an_earlier_runner_that_is_still_named_is_no_stranger_that_goes() -> None:
    trace = trace_of(beside(p9=GIB), beside(p9=GIB), beside(), exists=False)
    assert (trace.other_processes, trace.moved) == ({}, {})


@pytest.mark.parametrize(
    ("readings", "moved"),
    [
        ([beside(p9=GIB)] * 3, {}),
        ([beside(p9=None)] * 3, {}),
        ([beside(p9=GIB), beside(p9=GIB + MIB), beside(p9=GIB)], {}),
        ([beside(p9=GIB), beside(p9=GIB), beside(p9=3 * GIB)], {9: 2 * GIB}),
        ([beside(p9=GIB), beside(), beside()], {9: GIB}),
        ([beside(), beside(p9=GIB), beside(p9=GIB)], {9: GIB}),
        ([beside(), beside(p9=None), beside(p9=None)], {9: None}),
        ([beside(), beside(p9=GIB), beside()], {}),
    ],
    ids=["still", "still without a size", "a desktop breathes", "grew", "went", "came", "came without a size", "a glimpse"],
)
def test_a_stranger_that_moved(readings: list[Reading], moved: dict[int, int | None]) -> None:
    assert trace_of(*readings).moved == moved


def test_a_list_that_could_not_be_read_makes_no_stranger_come_or_go() -> None:
    unread = Reading(total_bytes=None, reason="the driver does not answer", listed=False)
    assert trace_of(unread, beside(p9=GIB), unread, beside(p9=GIB), beside(p9=GIB)).moved == {}


class Devices(Script):
    """The same with a device whose memory peaks between two readings."""

    peek_interval = 0.001

    def __init__(self, *peeks: int | None) -> None:
        super().__init__(Reading(total_bytes=7))
        self._peeks = list(peeks)
        self.all_seen = threading.Event()

    def take_baseline(self) -> Occupancy:
        return Occupancy()

    occupancy = take_baseline

    def risen(self) -> dict[str, int]:
        return {}

    def peek(self) -> int | None:
        if not self._peeks:
            self.all_seen.set()
            return 1
        return self._peeks.pop(0)

    def accounted(self, pids: frozenset[int]) -> int | None:
        return 1000 + sum(pids)


def test_a_peak_between_two_readings_and_the_driver_s_own_stand_beside_the_readings() -> None:
    meter = Devices(5, 90, None, 6)
    subject = Sampler(meter, lambda: frozenset({1}))
    subject.start()
    assert meter.all_seen.wait(60)
    trace = subject.stop()
    assert (trace.peak_bytes, trace.device_peak_bytes, trace.accounted_peak_bytes) == (7, 90, 1001)


def test_a_figure_by_process_and_a_device_s_rise_make_no_plateau() -> None:
    rise = Reading(total_bytes=100, basis="device-delta", reason="N/A")
    assert steady_stretch([*known(100, 100), rise], 3, MIB) is None
    found = steady_stretch([rise] * 3, 3, MIB)
    assert found is not None
    assert (found.basis, found.reason) == ("device-delta", "N/A")


@pytest.mark.parametrize(("now", "next_one"), [(0.9, 1.0), (1.0, 1.0), (1.1, 2.0), (3.7, 4.0)])
def test_a_slow_reading_loses_ticks_and_keeps_the_grid(now: float, next_one: float) -> None:
    assert next_deadline(0.0, 1.0, now) == pytest.approx(next_one)


def test_a_driver_that_hangs_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.meters.sampler.STOP_LIMIT", 0.01)
    hanging = threading.Event()

    class Hangs(Script):
        def read(self, pids: frozenset[int]) -> Reading:
            hanging.wait(60)
            return super().read(pids)

    subject = Sampler(Hangs(*known(1)), lambda: frozenset({1}))
    subject.start()
    with pytest.raises(UntrustedError, match="stopped returning readings"):
        subject.stop()
    hanging.set()


def test_a_settled_engine_gives_its_plateau() -> None:
    subject = sampler(*known(3 * MIB, 6 * MIB, 8 * MIB))
    subject.start()
    found = subject.settle(60)
    subject.stop()
    assert found.total_bytes == 8 * MIB


def test_an_engine_that_ended_is_not_waited_for() -> None:
    found = sampler(*known(1)).settle(1e9, alive=lambda: False)
    assert (found.total_bytes, found.reason) == (None, "the engine ended while its memory settled")


def test_a_deadline_that_passed_says_what_the_meter_said() -> None:
    subject = sampler(*known(None))
    found = subject.settle(0, alive=lambda: subject.read_once() is not None)
    assert (found.total_bytes, found.reason) == (None, "N/A")


@pytest.mark.parametrize("error", [RuntimeError("boom"), UntrustedError("a GPU was lost", code="gpu-lost")])
def test_a_dead_sampler_fails_the_run(error: Exception) -> None:
    subject = sampler(*known(1), error)
    subject.start()
    with pytest.raises(UntrustedError):
        subject.settle(60, readings=10)
    with pytest.raises(UntrustedError):
        subject.stop()


def test_stop_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    subject = sampler(*known(1))
    subject.start()
    subject.stop()
    assert set(threading.enumerate()) <= before


def test_thinning_keeps_the_extremes_in_order() -> None:
    samples = [Sample(seconds=float(i), total_bytes=i % 7) for i in range(5000)]
    samples[1234], samples[4321] = Sample(seconds=1234.0, total_bytes=10**9), Sample(seconds=4321.0, total_bytes=-1)
    kept = thin(samples, 400)
    assert len(kept) <= 400
    assert {samples[1234], samples[4321]} <= set(kept)
    assert list(kept) == sorted(kept, key=lambda sample: sample.seconds)
