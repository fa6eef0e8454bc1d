"""Lines that a terminal or a mailer folded: where they were broken, and how they go together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from harness.logs.unwrap import Layout, Message

#: How a message of its own begins: a function's name, a pair, a process, a record, a level.
HEAD: Final = re.compile(
    r"[\w~]{2,60}:\s|[a-z]{2,8}\s{1,20}\w{1,40}:\s|[\w.]{1,40}=\S|\([A-Z]\w{1,40} |[{\[]|(?:INFO|WARNING|ERROR|DEBUG)\s"
    r"|[\w./-]{1,200}\.\w{1,4}:\d{1,6}: "
)
_START: Final = re.compile(r"[^\s=:]{1,60}[=:]?")


class Joiner:
    """Puts messages together whose lines were folded; one line behind."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pending: list[Message] = []
        self._full = False

    def feed(self, line: str) -> list[Message]:
        """The messages that are complete now that this line came."""
        line = self._layout.clean(line)
        messages = self._layout.messages(line)
        if len(self._pending) == len(messages) == 1 and (joined := self._joined(line, messages[0].text)) is not None:
            self._pending = [self._pending[0]._replace(text=joined)]
            return []
        done, self._pending = self._pending, messages
        text = messages[-1].text if messages else ""
        self._see(line, text)
        return [message._replace(text=message.text.rstrip()) for message in done]

    def finish(self) -> list[Message]:
        """The last ones."""
        done, self._pending = self._pending, []
        return done

    def _see(self, line: str, text: str) -> None:
        """Remember whether a line is as long as the terminal was wide, with the blanks at its end."""
        layout = self._layout
        self._full = bool(text) and len(line if layout.width else text) == (layout.width or layout.inner_width)
        if self._full and layout.width and self._pending:
            last = self._pending[-1]
            self._pending[-1] = last._replace(text=last.text + " " * (len(line) - len(line.rstrip())))

    def _joined(self, line: str, text: str) -> str | None:
        before, outer = self._pending[0].text, self._layout.outer
        if len(before) > 1 << 14:
            return None
        if self._full and start_of(text) not in self._layout.starts:
            if self._layout.width:  # what looks like a bullet or a time may be the message's own
                text = line[len(outer) :] if masked(line[: len(outer)]) == outer else line
            self._full = len(line if self._layout.width else text) == (self._layout.width or self._layout.inner_width)
            return before + (text if self._full else text.rstrip())
        pair = self._layout.folded and "level=" in before and "time=" not in text and (line[:1] in " \t" or open_quote(before))
        return f"{before} {text}" if pair and (not HEAD.match(text) or "=" in text.split(" ", 1)[0]) else None


def masked(text: str) -> str:
    """A text with 0 for every digit."""
    return re.sub(r"\d", "0", text)


def start_of(text: str) -> str:
    """How a message begins: its first word, up to a colon or the sign of a pair."""
    found = _START.match(text)
    return masked(found[0]) if found else ""


def open_quote(text: str) -> bool:
    """Whether a quote is open at the end."""
    return text.replace('\\"', "").count('"') % 2 == 1


def width_of(rows: Sequence[tuple[str, str]]) -> tuple[int, int, frozenset[str]]:
    """How often a terminal broke lines, at which width, and how messages begin.

    No line is longer than the width, and what follows a full one begins as no other message does.
    """
    longest = max((len(line) for line, _ in rows), default=0)
    if not 40 <= longest <= 400:
        return 0, 0, frozenset()
    starts = frozenset(start_of(text) for (line, _), (_, text) in itertools.pairwise([("", ""), *rows]) if len(line) < longest)
    if sum(len(line) == longest and line.endswith(" ") for line, _ in rows) * 2 > len(rows):
        return 0, 0, frozenset()  # a screen fills its lines with blanks
    after = [text for (line, _), (_, text) in itertools.pairwise(rows) if len(line) == longest and text]
    torn = [text for text in after if start_of(text) not in starts]
    sure = len(after) > 1 and len(torn) * 4 >= len(after) * 3 and any(not HEAD.match(text) for text in torn)
    return (len(torn), longest, starts) if sure else (0, 0, frozenset())
