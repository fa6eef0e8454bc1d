"""Where memory moved between two versions, in lines and as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from harness.prediction.drift import sentences
from harness.render.drift import percent, show
from harness.text import clean

if TYPE_CHECKING:
    from harness.maintain.bisect import Bisection


def bisection_text(found: Bisection) -> Iterator[str]:
    """The place, then what moved there in the words of ``harness diff``."""
    between = f" (passed over: {', '.join(found.skipped)})" if found.skipped else ""
    yield clean(f"{found.first} is the first with another memory, {found.last} the last before it{between}")
    for figure in found.drift.figures:
        if figure.moved and figure.kind in ("constant", "part", "band"):
            yield clean(f"  {figure.name}  {show(figure.old)} → {show(figure.new)}  {percent(figure)}".rstrip())
    yield from (clean(f"  {line}") for line in sentences(found.drift.effects, found.target))


def document(found: Bisection) -> dict[str, Any]:
    """The object of ``bisect --json``."""
    return {
        "last_good": found.last,
        "first_bad": found.first,
        "skipped": list(found.skipped),
        "steps": msgspec.to_builtins(found.steps),
        "figures": [{**msgspec.to_builtins(figure), "moved": figure.moved} for figure in found.drift.figures],
        "effects": sentences(found.drift.effects, found.target),
    }
