"""What a workflow tells whoever is watching. The terminal draws it; tests record it."""

from __future__ import annotations

import logging
from typing import Final

_LOGGER: Final = logging.getLogger("harness")


class Observer:
    """Hears of a run while it goes on, and does nothing: a subclass says what it does. No method blocks or raises."""

    def say(self, text: str) -> None:
        """A choice that was made, or a thing worth knowing."""

    def warn(self, text: str) -> None:
        """Something that the user should read."""

    def phase(self, title: str, step: int, steps: int) -> None:
        """A phase begins."""

    def progress(self, what: str, done: float, total: float | None) -> None:
        """How far a long step is."""

    def memory(self, now: int | None, peak: int | None) -> None:
        """A reading of the meter, bytes."""

    def point(self, context: int, num_batch: int | None, total: int | None, note: str | None) -> None:
        """A load was measured."""


class Logged(Observer):
    """Writes to the logger ``harness``; where logging is not set up, Python prints the warnings to standard error."""

    def say(self, text: str) -> None:
        """At level INFO."""
        _LOGGER.info("%s", text)

    def warn(self, text: str) -> None:
        """At level WARNING."""
        _LOGGER.warning("%s", text)
