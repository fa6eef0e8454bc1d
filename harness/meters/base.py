"""The seam between memory meters and the sampler."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Protocol, runtime_checkable

from harness.model.trace import MeterName, Occupancy, Reading
from harness.units import MIB

#: A device that rose by less than this holds no engine: a CUDA context alone takes more.
CONTEXT: Final = 16 * MIB


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
        """Give back what the meter holds: most hold nothing."""
        return


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
        return None


class BaselineMeter(DeviceMeter):
    """Meters of the devices called ``names``: their rise stands in where no figure by process can be had."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._baseline: dict[str, int] = {}

    def used(self) -> dict[str, int]:
        """Bytes in use on each device; those that cannot be read are left out."""
        raise NotImplementedError

    def take_baseline(self) -> Occupancy:
        """What the devices hold before the engine."""
        found = self.occupancy()
        self._baseline = found.devices
        return found

    def risen(self) -> dict[str, int]:
        """Bytes of each device above its baseline, never below 0; none without a baseline."""
        return {one: max(size - self._baseline[one], 0) for one, size in self.used().items() if one in self._baseline}

    def peek(self) -> int | None:
        """All devices' rise; ``None`` where one of them cannot be read."""
        risen = self.risen()
        return sum(risen.values()) if risen.keys() == self._names else None

    def rise_instead(self, why: str, other_processes: dict[int, int | None], *, listed: bool = True) -> Reading:
        """A reading without figures by process: what the devices rose by, where no other process is on them."""
        if other_processes:
            why = f"{why}; as others are on the GPU, neither does its rise tell"
            return Reading(total_bytes=None, reason=why, other_processes=other_processes)
        devices = self.risen()
        total = sum(devices.values())
        if devices.keys() != self._names or total < CONTEXT:
            return Reading(total_bytes=None, reason=why, listed=listed)
        return Reading(total_bytes=total, devices=devices, reason=why, basis="device-delta", listed=listed)
