"""A thread that reads a meter on a deadline clock, and the plateaus in what it read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

from harness.errors import UntrustedError
from harness.meters.base import DeviceMeter, Meter
from harness.model.trace import Mark, MemoryTrace, Plateau, Reading, Sample
from harness.units import MIB

#: Samples kept in a record; the peak is over every reading.
KEPT_SAMPLES: Final = 400
#: How long the last reading may take once it is to stop, seconds: a driver can hang.
STOP_LIMIT: Final = 30.0
#: Another process may move by this much, bytes, without being held responsible: desktop programs come and go.
STRANGER_MOVE: Final = 16 * MIB
_Watcher = Callable[[int | None, int | None], None]


class Sampler:
    """Reads ``meter`` over ``pids()`` every ``meter.interval`` seconds, from :meth:`start` to :meth:`stop`.

    Between the readings a device's memory as a whole is looked at more often, so that no peak is missed. ``exists`` says
    whether a PID is a process of this machine.
    """

    def __init__(
        self,
        meter: Meter,
        pids: Callable[[], frozenset[int]],
        *,
        on_reading: _Watcher | None = None,
        exists: Callable[[int], bool] = lambda pid: Path(f"/proc/{pid}").exists(),
    ) -> None:
        self._meter, self._pids, self._on_reading = meter, pids, on_reading
        self._exists = exists
        self._devices = meter if isinstance(meter, DeviceMeter) else None
        self._condition = threading.Condition()
        self._stopping = threading.Event()
        self._readings: list[tuple[float, Reading]] = []
        self._marks: list[Mark] = []
        self._failures: dict[str, int] = {}
        self._strangers: dict[int, _Stranger] = {}
        self._listed = False
        self._ours: set[int] = set()
        self._peak: int | None = None
        self._device_peak: int | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._epoch = 0.0

    def start(self) -> None:
        """Begin to read, in a thread of its own."""
        self._epoch = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="harness-sampler", daemon=True)
        self._thread.start()

    def mark(self, phase: str) -> None:
        """Note that a phase begins now."""
        self._marks.append(Mark(seconds=round(time.monotonic() - self._epoch, 3), phase=phase))

    def _run(self) -> None:
        reading = time.monotonic()
        peek = float("inf") if self._devices is None else reading
        try:
            while not self._stopping.is_set():
                if time.monotonic() >= reading:
                    self.read_once()
                    reading = next_deadline(reading, self._meter.interval, time.monotonic())
                if self._devices is not None and time.monotonic() >= peek:
                    self._look(self._devices)
                    peek = next_deadline(peek, self._devices.peek_interval, time.monotonic())
                self._stopping.wait(max(min(reading, peek) - time.monotonic(), 0.0))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits
            with self._condition:
                self._error = error
                self._condition.notify_all()

    def _look(self, meter: DeviceMeter) -> None:
        risen = meter.peek()
        if risen is not None:
            self._device_peak = max(self._device_peak or 0, risen)

    def read_once(self) -> Reading:
        """Take one reading now (the thread does nothing else)."""
        pids = self._pids()
        reading = self._meter.read(pids)
        with self._condition:
            self._note_strangers(pids, reading)
            self._readings.append((time.monotonic() - self._epoch, reading))
            if reading.total_bytes is None:
                reason = reading.reason or "no reading"
                self._failures[reason] = self._failures.get(reason, 0) + 1
            else:
                self._peak = max(self._peak or 0, reading.total_bytes)
            self._condition.notify_all()
        if self._on_reading is not None:
            self._on_reading(reading.total_bytes, self._peak)
        return reading

    def _note_strangers(self, pids: frozenset[int], reading: Reading) -> None:
        """Called for each reading: who else is there, and what they hold compared with the start of the trace."""
        # A process that has ended (an earlier runner of the engine, as a rule) may be named until its memory is back.
        now = {pid: size for pid, size in reading.other_processes.items() if self._exists(pid)}
        if reading.listed and not self._listed:
            self._listed = True
            self._strangers = {pid: _Stranger(size, from_start=True) for pid, size in now.items()}
        for pid, size in now.items():
            self._strangers.setdefault(pid, _Stranger(size, from_start=False)).see(size)
        if reading.listed:
            for pid in self._strangers.keys() - now.keys():
                self._strangers[pid].miss()
        self._ours |= pids
        for pid in pids:  # a child of the engine can hold memory a moment before its PID is known to be the engine's
            self._strangers.pop(pid, None)

    def settle(
        self,
        timeout: float,
        *,
        alive: Callable[[], bool] = lambda: True,
        readings: int = 5,
    ) -> Plateau:
        """Wait until the last ``readings`` readings, all taken since this call, lie within one MiB.

        Returns the plateau; after ``timeout`` seconds, or when the engine has ended, one without a figure that says why.

        Raises:
            UntrustedError: the sampler died.
        """
        with self._condition:
            first = len(self._readings)
            deadline = time.monotonic() + timeout
            while True:
                self._raise_error()
                steady = steady_stretch([reading for _, reading in self._readings[first:]], readings, MIB)
                if steady is not None:
                    return steady
                if not alive():
                    return Plateau(total_bytes=None, reason="the engine ended while its memory settled")
                left = deadline - time.monotonic()
                if left <= 0:
                    return Plateau(total_bytes=None, reason=self._why_not(first, timeout))
                self._condition.wait(min(left, 0.25))

    def _why_not(self, first: int, timeout: float) -> str:
        last = self._readings[-1][1] if len(self._readings) > first else None
        if last is None:
            return f"the meter gave no reading in {timeout:.0f} s"
        return last.reason or f"memory did not settle within {timeout:.0f} s"

    def stop(self) -> MemoryTrace:
        """Stop reading and return the trace.

        Raises:
            UntrustedError: the sampler died.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=STOP_LIMIT)
            if self._thread.is_alive():
                raise UntrustedError("the memory meter stopped returning readings", code="sampler-stuck")
        accounted = None if self._devices is None else self._devices.accounted(frozenset(self._ours))
        with self._condition:
            self._raise_error()
            samples = [Sample(seconds=round(at, 3), total_bytes=reading.total_bytes) for at, reading in self._readings]
            return MemoryTrace(
                meter=self._meter.name,
                samples=thin(samples),
                marks=tuple(self._marks),
                peak_bytes=self._peak,
                readings=len(samples),
                failures=dict(self._failures),
                other_processes={pid: one.most for pid, one in self._strangers.items()},
                moved={pid: one.moved for pid, one in self._strangers.items() if one.has_moved},
                device_peak_bytes=self._device_peak,
                accounted_peak_bytes=accounted,
            )

    def _raise_error(self) -> None:
        if isinstance(self._error, UntrustedError):
            raise self._error
        if self._error is not None:
            raise UntrustedError(f"the memory sampler failed: {self._error!r}", code="sampler-died") from self._error


class _Stranger:
    """What another process held during a trace: its least and its most, bytes (``None``: the driver does not say)."""

    def __init__(self, size: int | None, *, from_start: bool) -> None:
        self.most = size
        self._least = size if from_start else 0
        self._came, self._went = not from_start, False
        # Seen only once, it may have been a short-lived child of the engine.
        self._seen = 2 if from_start else 0

    def see(self, size: int | None) -> None:
        """It is there, and holds ``size``."""
        self._seen += 1
        if size is not None:
            self.most = max(size, self.most or 0)
            self._least = size if self._least is None else min(size, self._least)

    def miss(self) -> None:
        """It is missing, or no longer there."""
        self._went, self._least = True, 0

    @property
    def moved(self) -> int | None:
        """Bytes between its least and its most; ``None`` where they are not known."""
        return None if self.most is None or self._least is None else self.most - self._least

    @property
    def has_moved(self) -> bool:
        """Whether it came, went, grew or shrank by what matters."""
        moved = self.moved
        return self._seen > 1 and (self._came or self._went if moved is None else moved > STRANGER_MOVE)


def next_deadline(deadline: float, interval: float, now: float) -> float:
    """The next tick of a grid after ``deadline``; ticks that a slow reading swallowed are skipped."""
    deadline += interval
    late = now - deadline
    return deadline + interval * (late // interval + 1) if late > 0 else deadline


def steady_stretch(readings: list[Reading], count: int, tolerance: int) -> Plateau | None:
    """The plateau of the last ``count`` readings, if they lie within ``tolerance`` bytes of each other."""
    last = readings[-count:]
    sizes = [reading.total_bytes for reading in last if reading.total_bytes is not None]
    if len(last) < count or len(sizes) < count or max(sizes) - min(sizes) > tolerance:
        return None
    if len({reading.basis for reading in last}) > 1:
        return None
    return Plateau(
        total_bytes=round(median(sizes)),
        spread_bytes=max(sizes) - min(sizes),
        readings=count,
        reason=last[-1].reason,
        devices=last[-1].devices,
        basis=last[-1].basis,
    )


def thin(samples: list[Sample], keep: int = KEPT_SAMPLES) -> tuple[Sample, ...]:
    """At most about ``keep`` samples: of each stretch its smallest and largest stay, in time order."""
    if len(samples) <= keep:
        return tuple(samples)
    size = -(-len(samples) * 2 // keep)
    kept: list[Sample] = []
    for start in range(0, len(samples), size):
        stretch = samples[start : start + size]
        known = [sample for sample in stretch if sample.total_bytes is not None] or stretch[:1]
        low = min(known, key=lambda sample: sample.total_bytes or 0)
        high = max(known, key=lambda sample: sample.total_bytes or 0)
        kept.extend(sorted({low, high}, key=lambda sample: sample.seconds) if low != high else [low])
    return tuple(kept)
