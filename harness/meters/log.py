"""No meter at all: the logged buffers themselves are the figure, which every output says."""

from __future__ import annotations

from harness.meters.base import Meter
from harness.model.trace import MeterName, Reading


class LogMeter(Meter):
    """For GPUs without a driver meter (Vulkan, ROCm, RPC)."""

    name: MeterName = "log"
    interval: float = 1.0

    def read(self, pids: frozenset[int]) -> Reading:
        """Never a figure."""
        return Reading(total_bytes=None, reason="memory is logged, not measured", basis="logged")
