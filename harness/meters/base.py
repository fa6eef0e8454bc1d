"""The seam between memory meters and the sampler."""

from __future__ import annotations

from typing import Protocol

from harness.core.trace import MeterName, Reading


class Meter(Protocol):
    """Reads the memory of an engine's processes. ``read`` may be called from the sampler's thread."""

    @property
    def name(self) -> MeterName:
        """``nvml``, ``host`` or ``log``."""

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
