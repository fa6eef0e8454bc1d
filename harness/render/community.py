"""What became of shared calibrations, in lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from harness.text import clean

if TYPE_CHECKING:
    from harness.maintain.community import TakenFile

_WORDS: Final = {
    "own": "there is one of your own", "other": "a nearer or newer one was taken", "far": "of another machine",
    "added": "added", "refused": "refused", "unreadable": "unreadable",
}  # fmt: skip


def taken_text(found: Sequence[TakenFile]) -> Iterator[str]:
    """A line for each file."""
    for one in found:
        where = f"{one.source} -> {one.target}" if one.target else one.source
        yield clean(f"{_WORDS[one.action]}: {where}{f'  ({one.reason})' if one.reason else ''}")
