"""The sampler's plateaus and its trace, on a meter that a test writes down; no time passes."""

from __future__ import annotations

import threading

import pytest

from harness.core.trace import MeterName, Reading, Sample
from harness.errors import UntrustedError
from harness.meters.sampler import Sampler, steady_stretch, thin
from harness.units import MIB


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


def test_a_stranger_mid_run_is_kept_at_its_largest_and_a_late_child_is_none() -> None:
    late_child = Reading(total_bytes=1, strangers={2: 5})
    stranger = Reading(total_bytes=1, strangers={99: 70, 100: None})
    pids = iter([frozenset({1}), frozenset({1, 2}), frozenset({1, 2})])
    subject = Sampler(Script(late_child, stranger, Reading(total_bytes=1, strangers={99: 30})), lambda: next(pids))
    for _ in range(3):
        subject.read_once()
    assert subject.stop().strangers == {99: 70, 100: None}


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
    subject.start()
    assert subject.settle(0).total_bytes is None
    subject.stop()


@pytest.mark.parametrize("error", [RuntimeError("boom"), UntrustedError("a GPU was lost", code="gpu-lost")])
def test_a_dead_sampler_fails_the_run(error: Exception) -> None:
    subject = sampler(*known(1), error)
    subject.start()
    with pytest.raises(UntrustedError):
        subject.settle(60, readings=10)
    with pytest.raises(UntrustedError):
        subject.stop()


def test_stop_leaves_no_thread() -> None:
    before = threading.active_count()
    subject = sampler(*known(1))
    subject.start()
    subject.stop()
    assert threading.active_count() == before


def test_thinning_keeps_the_extremes_in_order() -> None:
    samples = [Sample(seconds=float(i), total_bytes=i % 7) for i in range(5000)]
    samples[1234], samples[4321] = Sample(seconds=1234.0, total_bytes=10**9), Sample(seconds=4321.0, total_bytes=-1)
    kept = thin(samples, 400)
    assert len(kept) <= 400
    assert {samples[1234], samples[4321]} <= set(kept)
    assert list(kept) == sorted(kept, key=lambda sample: sample.seconds)
