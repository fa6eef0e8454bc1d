"""Tables, labelled fields and sentences as lines of text for a screen of any width, and for pipes.

What is drawn is plain text with colours as :func:`harness.render.style.paint` has them. A width of ``None`` is that of a pipe:
nothing is wrapped or left out, and each item is one line.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import msgspec

from harness.render.style import paint

_COLOUR: Final = re.compile(r"\x1b\[[0-9]*m")
#: A word; a figure keeps its unit.
_WORD: Final = re.compile(r" *[^ ]*\d (?:[KMG]iB|tokens|%)\S*| *[^ ]+")
_GAP: Final = 2
#: Values that say nothing: a column of them is not drawn.
_NOTHING: Final = frozenset({"", "–"})
#: A label leaves its value at least so many columns, else the value stands below it.
_LEAST_VALUE: Final = 24


class Drawn(Protocol):
    """What can be drawn at a width, in columns."""

    def lines(self, width: int | None) -> Iterator[str]:
        """The lines."""
        ...


def columns_of(text: str) -> int:
    """The columns that a text takes on a terminal: wide characters (Unicode UAX 11) take two, colours none."""
    text = _COLOUR.sub("", text)
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )  # fmt: skip


def wrap(text: str, width: int | None, indent: str = "") -> Iterator[str]:
    """A sentence in lines of at most ``width`` columns, broken at spaces alone; ``indent`` stands before all but the first."""
    if "\n" in text:
        for one in text.split("\n"):
            yield from wrap(one, width, indent)
        return
    bare = _COLOUR.sub("", text)
    start = bare[: len(bare) - len(bare.lstrip(" "))]
    if width is None or columns_of(text) <= width:
        yield text
        return
    line = ""
    for word in _WORD.findall(text):  # with the spaces before it
        if columns_of(line.strip(" ")) and columns_of(line) + columns_of(word) > width:
            yield line
            line = start + indent + word.lstrip(" ")
        else:
            line += word
    yield line


class Hanging(msgspec.Struct, frozen=True):
    """A sentence whose further lines begin ``indent`` columns from the left."""

    text: str
    indent: int

    def lines(self, width: int | None) -> Iterator[str]:
        """One line, or as many as the width asks for."""
        bare = _COLOUR.sub("", self.text)
        start = len(bare) - len(bare.lstrip(" "))
        yield from wrap(self.text, width, " " * (self.indent - start))


class Verbatim(msgspec.Struct, frozen=True):
    """Text that is copied, such as a command line or a file: no line is broken."""

    text: str

    def lines(self, width: int | None) -> Iterator[str]:
        """The text as it is."""
        yield self.text


class Fields(msgspec.Struct, frozen=True):
    """Labels and their values, one below the other; a value is wrapped beside its label, or below it where little room is."""

    rows: tuple[tuple[str, str], ...]
    indent: int = 2

    def lines(self, width: int | None) -> Iterator[str]:
        """A line or more for each label."""
        start = " " * self.indent
        label = max((columns_of(name) for name, _ in self.rows), default=0) + _GAP
        for name, value in self.rows:
            if width is None or width - self.indent - label >= min(_LEAST_VALUE, columns_of(value)):
                first, *rest = wrap(value, None if width is None else width - self.indent - label)
                yield start + paint(_padded(name, label), dim=True) + first
                yield from (start + " " * label + line for line in rest)
            else:
                yield start + paint(name, dim=True)
                yield from wrap(f"{start}  {value}", width)


class Column(msgspec.Struct, frozen=True):
    """A column: its heading, whether it is of figures, and which is left out first where room is short.

    The highest ``rank`` goes first; rank 0 never does.
    """

    head: str
    right: bool = True
    rank: int = 0


class Table(msgspec.Struct, frozen=True):
    """Rows under headings. A first cell longer than half the width stands on a line of its own.

    Where the columns of rank 0 alone have no room, records take its place: the first cell of a row, then fields.
    """

    columns: tuple[Column, ...]
    rows: Sequence[tuple[str, ...]]
    indent: int = 0

    def lines(self, width: int | None) -> Iterator[str]:
        """The table, or its rows as records."""
        widths = self._widths()
        shown = self._shown(width, widths)
        if width is not None and widths[0] > width // 2 and (shown is None or len(shown) < len(self.columns)):
            firsts = (self.columns[0].head, *(row[0] for row in self.rows))
            widths[0] = max((size for size in map(columns_of, firsts) if size <= width // 2), default=0)
            shown = self._shown(width, widths)
        if shown is None:
            yield from self._records(width)
            return
        start = " " * self.indent
        if any(self.columns[index].head for index in shown):
            heads = [_aligned(self.columns[index].head, widths[index], self.columns[index].right) for index in shown]
            yield start + paint((" " * _GAP).join(heads).rstrip(), dim=True)
        for row in self.rows:
            first = row[0]
            if columns_of(first) > widths[0]:
                yield start + first
                first = ""
            cells = [_aligned(first if not index else row[index], widths[index], self.columns[index].right) for index in shown]
            yield (start + (" " * _GAP).join(cells)).rstrip()

    def _widths(self) -> list[int]:
        return [
            max([columns_of(column.head), *(columns_of(row[index]) for row in self.rows)])
            for index, column in enumerate(self.columns)
        ]

    def _shown(self, width: int | None, widths: Sequence[int]) -> list[int] | None:
        """The columns that have room, by their numbers; ``None`` where the indispensable ones have not."""
        said = [
            index
            for index in range(len(self.columns))
            if index == 0 or any(_COLOUR.sub("", row[index]) not in _NOTHING for row in self.rows)
        ]
        while width is not None and self.indent + sum(widths[index] + _GAP for index in said) - _GAP > width:
            last = max(said, key=lambda index: (self._rank(index), index))
            if not self.columns[last].rank:
                return None
            said.remove(last)
        return said

    def _rank(self, index: int) -> int:
        """A column that says the same of every row is left out before those that tell rows apart."""
        rank = self.columns[index].rank
        alike = len(self.rows) > 1 and len({row[index] for row in self.rows}) == 1
        return rank + 100 if rank and alike else rank

    def _records(self, width: int | None) -> Iterator[str]:
        for row in self.rows:
            yield from wrap(" " * self.indent + row[0], width)
            named = zip(self.columns[1:], row[1:], strict=True)
            fields = tuple((one.head, cell) for one, cell in named if one.head and _COLOUR.sub("", cell) not in _NOTHING)
            yield from Fields(fields, self.indent + 2).lines(width)


def _aligned(text: str, width: int, right: bool) -> str:
    return " " * (width - columns_of(text)) + text if right else _padded(text, width)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - columns_of(text))
