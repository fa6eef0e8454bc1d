"""What vLLM decides: nothing is spilled and nothing is kept free; it starts with what it is given, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.engines.policy import Policy
from harness.model.calibration import Calibration
from harness.prediction.rules import Sized

if TYPE_CHECKING:
    from harness.model.record import Record


class VllmPolicy(Policy):
    """vLLM's decisions."""

    name = "vllm"
    title = "vLLM"

    def sized(self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...]) -> Sized | None:
        """By the blocks of its KV cache. Each GPU of an instance takes the same, so the fullest decides."""
        from harness.prediction.allocation import size

        sizing = size(calibration, context, num_parallel, available)
        return Sized(
            required_bytes=sizing.required_bytes,
            reserve_bytes=sizing.margin_bytes,
            available_bytes=sizing.card.free,
            short_bytes=sizing.short_bytes,
            max_context=sizing.max_context,
        )

    def fit(self, record: Record) -> Calibration:
        """From starts by share and by bytes."""
        from harness.fit.vllm import fit_vllm

        return fit_vllm(record)
