"""vLLM's log. Not read yet: no load is reported rather than a wrong one."""

from __future__ import annotations

from harness.core.facts import LoadFacts


class VllmReader:
    """Takes lines of a vLLM log."""

    def feed_line(self, line: str) -> None:
        """Look at one line."""

    def finish(self) -> list[LoadFacts]:
        """The loads told of."""
        return []
