"""Straight lines over the context."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Final

import msgspec

from harness.units import MIB

#: Rounding of a figure in the log is 0.005 MiB; sums of a few stay below this.
ROUNDING: Final = 0.03 * MIB


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """``start + slope * context``; bytes, and bytes per token of one slot."""

    start: float
    slope: float

    def at(self, context: float) -> float:
        """The value at ``context`` tokens per slot."""
        return self.start + self.slope * context


def fit_line(values: Sequence[tuple[float, float]]) -> Line:
    """Least squares through at least two different contexts; a slope that rounding alone could have made is none."""
    mean_x, mean_y = fmean(x for x, _ in values), fmean(y for _, y in values)
    spread = sum((x - mean_x) ** 2 for x, _ in values)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in values) / spread
    reach = max(x for x, _ in values) - min(x for x, _ in values)
    if abs(slope) * reach <= ROUNDING:
        slope = 0.0
    return Line(start=mean_y - slope * mean_x, slope=slope)
