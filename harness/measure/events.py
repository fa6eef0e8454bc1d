"""What a workflow tells whoever is watching. The terminal draws it; tests record it."""

from __future__ import annotations

import logging
from typing import Final, Protocol

_LOGGER: Final = logging.getLogger("harness")


class Observer(Protocol):
    """Hears of a run while it goes on. Every method returns at once and never raises."""

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


class Silent:
    """Hears nothing."""

    def say(self, text: str) -> None:
        """Ignore."""

    def warn(self, text: str) -> None:
        """Ignore."""

    def phase(self, title: str, step: int, steps: int) -> None:
        """Ignore."""

    def progress(self, what: str, done: float, total: float | None) -> None:
        """Ignore."""

    def memory(self, now: int | None, peak: int | None) -> None:
        """Ignore."""

    def point(self, context: int, num_batch: int | None, total: int | None, note: str | None) -> None:
        """Ignore."""


class Logged(Silent):
    """Writes to the logger ``harness``; where logging is not set up, Python prints the warnings to standard error."""

    def say(self, text: str) -> None:
        """At level INFO."""
        _LOGGER.info("%s", text)

    def warn(self, text: str) -> None:
        """At level WARNING."""
        _LOGGER.warning("%s", text)
