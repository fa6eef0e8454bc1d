"""What a load has come to so far."""

from __future__ import annotations

from harness.model.record import Load, LoadOutcome, LoadRequest, Reported
from harness.model.trace import MemoryTrace, Plateau


class LoadState:
    """Figures of a load while it is made. Seconds; ``log_start`` is where its log begins, ``left`` what it left behind."""

    def __init__(self, log_start: int = 0) -> None:
        self.log_start = log_start
        self.prompt: int | None = None
        self.idle: Plateau | None = None
        self.busy: Plateau | None = None
        self.trace: MemoryTrace | None = None
        self.ready: float | None = None
        self.left: int | None = None
        self.reported: Reported | None = None
        self.settled = 0.0
        self.requested = 0.0
        self.others: float | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The most that its processes held."""
        return None if self.trace is None else self.trace.peak_bytes

    def load(self, request: LoadRequest, outcome: LoadOutcome, reason: str | None) -> Load:
        """The load as it goes into the record, but for its log."""
        return Load(
            request=request,
            outcome=outcome,
            reason=reason,
            log_start=self.log_start,
            reported=self.reported,
            idle=self.idle,
            busy=self.busy,
            trace=self.trace,
            ready=self.ready,
            left_bytes=self.left,
            settle_seconds=round(self.settled, 3),
            request_seconds=round(self.requested, 3),
            prompt_tokens=self.prompt,
            cpu_by_others=self.others,
        )
