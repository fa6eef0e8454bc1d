"""No meter at all: the logged buffers themselves are the figure, which every output says."""

from __future__ import annotations

from harness.model.trace import MeterName, Reading


class LogMeter:
    """For GPUs without a driver meter (Vulkan, ROCm, RPC)."""

    @property
    def name(self) -> MeterName:
        """``log``."""
        return "log"

    @property
    def interval(self) -> float:
        """There is nothing to read, so seldom."""
        return 1.0

    def read(self, pids: frozenset[int]) -> Reading:
        """Never a figure."""
        return Reading(total_bytes=None, reason="memory is logged, not measured", basis="logged")

    def close(self) -> None:
        """Nothing is held."""
