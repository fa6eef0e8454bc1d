"""The seam between memory meters and the sampler."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from harness.model.trace import MeterName, Occupancy, Reading


class Meter(Protocol):
    """Reads the memory of an engine's processes. ``read`` may be called from the sampler's thread."""

    @property
    def name(self) -> MeterName:
        """``nvml``, ``drm``, ``host`` or ``log``."""

    @property
    def interval(self) -> float:
        """Shortest sensible time between two readings, seconds (NVML's process list: 0.25)."""

    def read(self, pids: frozenset[int]) -> Reading:
        """One reading over ``pids``. Never raises for a reading that cannot be had: ``total_bytes`` is ``None`` then.

        Raises:
            UntrustedError: when the run is void (a GPU was lost mid-run).
        """

    def close(self) -> None:
        """Give back what the meter holds."""


@runtime_checkable
class DeviceMeter(Meter, Protocol):
    """A meter that also sees devices as a whole. Its methods raise as :meth:`Meter.read` does."""

    @property
    def peek_interval(self) -> float:
        """Shortest sensible time between two calls of :meth:`peek`, seconds."""

    def take_baseline(self) -> Occupancy:
        """What the devices hold now, before the engine: later differences are taken from it."""

    def occupancy(self) -> Occupancy:
        """What the devices hold now."""

    def risen(self) -> dict[str, int]:
        """Bytes by which each device (UUID) is above its baseline now; those that cannot be read are left out."""

    def peek(self) -> int | None:
        """The sum of :meth:`risen`, cheap; ``None`` where a device cannot be read."""

    def accounted(self, pids: frozenset[int]) -> int | None:
        """The driver's own record of the largest use of each process, added up; ``None`` unless its accounting is on."""
