"""What an engine decides, and how it is measured: the pure half of the seam. :mod:`harness.engines.base` is the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.prediction.rules import Rules

if TYPE_CHECKING:
    from harness.fit.load_plan import BatchLimits
    from harness.model.calibration import Calibration
    from harness.model.record import Record


class Policy(Rules):
    """The decisions of one engine. Pure: no I/O, no clock, no environment.

    The defaults are those of a server that loads one GGUF at each start and leaves placement to llama.cpp's fit.
    """

    def batch_limits(self, version: str | None, *, target: str = "gpu", flash_attention: str = "auto") -> BatchLimits:
        """The batch that it takes where nobody sets one: (largest context, batch), ascending; empty where it is fixed."""
        return ()

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        """Device memory that its placement keeps free; ``None`` where it is not known."""
        return None

    def figures(self) -> dict[str, object]:
        """The figures of its rules as data, for the planner of ``harness report``."""
        return {}

    def fit(self, record: Record) -> Calibration:
        """The calibration of a record.

        Raises:
            UntrustedError: no constants can be had from it.
        """
        from harness.fit.constants import fit_record

        return fit_record(record)
