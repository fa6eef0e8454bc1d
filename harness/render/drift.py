"""A drift in words and figures, for the terminal, pull requests and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.prediction.drift import Change, Figure, sentences
from harness.text import clean

if TYPE_CHECKING:
    from harness.maintain.diff import Pair


def status_of(pair: Pair) -> str:
    """``added``, ``removed``, ``moved``, ``same`` (measured again, nothing moved) or ``untouched`` (the same measurement)."""
    if pair.drift is None:
        return "added" if pair.old is None else "removed"
    if pair.old == pair.new:
        return "untouched"
    return "moved" if pair.drift.moved else "same"


def show(value: object, digits: int = 6) -> str:
    """A figure as the artifact has it; digests are cut to what tells them apart."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}f}".rstrip("0").rstrip(".") or "0"
    if isinstance(value, int):
        return f"{value:,}"
    text = clean(str(value))
    return f"{text[:19]}…" if text.startswith("sha256:") else text


def percent(figure: Figure) -> str:
    """How far a figure moved, of what it was."""
    if not isinstance(figure.old, int | float) or not isinstance(figure.new, int | float) or not figure.old:
        return ""
    return f"{100 * (figure.new / figure.old - 1):+.1f} %"


def headline(changes: tuple[Change, ...]) -> list[str]:
    """Versions and machines that differ, one line each."""
    return [f"{change.name}: {show(change.old)} → {show(change.new)}" for change in changes]


def effects_of(pair: Pair) -> list[str]:
    """What a drift means, one line each."""
    if pair.drift is None or pair.new is None:
        return []
    return sentences(pair.drift.effects, pair.new.metadata.machine.target)
