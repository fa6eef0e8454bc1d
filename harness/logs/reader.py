"""The four steps in a row: bytes, lines of text, messages, facts of loads. Any bytes, any length, in memory that does not grow.

Most lines of a log that is served for days are alike but for their numbers. So the digits of a whole block are deleted at once,
and only lines that are new without them are searched for signs of a fact; a line without any is not unwrapped.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec

from harness.logs import llama, llama_table, vllm
from harness.logs.folds import Joiner
from harness.logs.table import Row
from harness.logs.text import MAX_LINE, TextLines
from harness.logs.unwrap import Layout, Message
from harness.model.facts import EngineName, LoadFacts, Unread

#: Bytes of a log that show how its lines are wrapped.
_HEAD: Final = 1 << 16
#: Kinds of lines that are remembered, writers that are distinguished, samples that are kept.
_PLANS, _WRITERS, _SAMPLES, _MOST_LOADS = 50_000, 64, 5, 10_000
#: Rows that one line may have been broken into.
_ROWS: Final = 400
_DIGITS: Final = b"0123456789"
#: A size: who prints one speaks of memory.
_MEMORY: Final = re.compile(r"\d\s?(?:[KMGT]i?B\b|bytes\b)")
Plan = tuple[Row, ...]
_TABLE: Final[Plan] = (*llama_table.TABLE, *vllm.TABLE)
#: Words of a line, without digits; ``ValueError`` has two, ``n_ctx`` too.
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_UNITS: Final = ("iB", " MB", " GB")
_ROLES: Final = ("noise", "fact", "failure")
_RANKED: Final = [
    (place, row.sign.encode().decode("latin-1"), row)
    for place, row in enumerate(sorted(_TABLE, key=lambda row: _ROLES.index(row.role)))
]
_SHARED: Final = Counter(word for _, sign, _ in _RANKED for word in set(_WORD.findall(sign)))
#: Rows by the rarest word of their sign; few signs have none.
_INDEX: Final[dict[str, list[tuple[int, str, Row]]]] = {}
_WORDLESS: Final = [
    (place, text, row)
    for place, sign, row in _RANKED
    if not _WORD.search(sign)
    for text in {sign, re.sub(r"\d", "", json.dumps(row.sign)[1:-1])}  # as JSON escapes it
]
for _one in _RANKED:
    if _words := _WORD.findall(_one[1]):
        _INDEX.setdefault(min(_words, key=lambda word: (_SHARED[word], -len(word))), []).append(_one)
#: Stands for a line with a size that is not known.
_UNKNOWN: Final = Row("B", lambda _reader, _message: False, "unknown")


class LogReading(msgspec.Struct, frozen=True, kw_only=True):
    """What a log says: its loads, and of what stands outside of them what was not understood and what was around it."""

    loads: list[LoadFacts]
    unread: Unread
    wrapping: tuple[str, ...]
    engine: EngineName | None = None


class _Writer:
    """The readers of one of the programs that wrote into a log."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.llama = llama.LlamaReader(numbers)
        self.vllm = vllm.VllmReader(numbers)


class LogReader:
    """Reads a log in chunks. ``feed`` never raises, whatever the bytes."""

    def __init__(self, unread: Callable[[str], None] | None = None) -> None:
        self._tell = unread
        self._text = TextLines()
        self._layout: Layout | None = None
        self._joiner: Joiner | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._plans: dict[bytes, Plan] = {}
        self._last = 0  # the number of the load that was begun last; what comes before any belongs to the first
        self._writers: dict[str, _Writer] = {}
        self._rows: list[bytes] = []  # of a line that was broken
        self._spoke: Counter[str] = Counter()
        self._unread: dict[int, tuple[int, tuple[str, ...]]] = {}

    def feed(self, data: bytes) -> None:
        """Take the next bytes, of any number."""
        for block in self._text.feed(data):
            self._block(block)

    def finish(self) -> LogReading:
        """What the log says."""
        for block in self._text.finish():
            self._block(block)
        if self._layout is None:
            self._begin()
        if self._joiner is not None:
            self._unfold(self._rows, self._joiner)
            self._dispatch(self._joiner.finish())
        found = [one for writer in self._writers.values() for one in (*writer.llama.finish(), *writer.vllm.finish())]
        found.sort(key=lambda one: one[0])
        wrapping = tuple(filter(None, (self._text.encoding, *(self._layout.seen if self._layout else ()))))
        loads, numbers = [], [number for number, _ in found]
        for at, (_, facts) in enumerate(found):
            until = numbers[at + 1] if at + 1 < len(numbers) else None
            mine = [
                kept
                for begun, kept in self._unread.items()
                if (at == 0 or begun >= numbers[at]) and (until is None or begun < until)
            ]
            loads.append(msgspec.structs.replace(facts, unread=_sum(mine), wrapping=wrapping))
        return LogReading(loads=loads, unread=_sum(self._unread.values()), wrapping=wrapping, engine=self._engine())

    def _engine(self) -> EngineName | None:
        """Whose words stand in the log."""
        if not self._spoke:
            return None
        if self._spoke.most_common(1)[0][0] == "vllm":
            return "vllm"
        return "ollama" if any(writer.llama.ollama for writer in self._writers.values()) else "llama-server"

    # -- lines ------------------------------------------------------------------------------------------------------

    def _block(self, block: bytes) -> None:
        if self._layout is not None:
            self._lines(block)
            return
        self._waiting.append(block)
        self._waiting_bytes += len(block) + 1
        if self._waiting_bytes > _HEAD:
            self._begin()

    def _begin(self) -> None:
        """The beginning of the log is here: see how it is wrapped."""
        text = b"\n".join(self._waiting)
        head = text[:_HEAD]
        if len(text) > _HEAD:
            head = head[: head.rfind(b"\n") + 1]
        self._waiting = []
        lines = [line[:MAX_LINE].decode("utf-8", "replace") for line in head.split(b"\n") if line]
        self._layout = Layout(lines)
        if self._layout.joins:
            self._joiner = Joiner(self._layout)
        self._lines(text)

    def _lines(self, block: bytes) -> None:
        plans = self._plans
        lines = block.split(b"\n")
        last = lines[-1] if self._text.cut else None
        if self._joiner is not None:
            for raw in lines:
                self._fold(raw[:MAX_LINE])
            return
        bare = block.translate(None, _DIGITS).split(b"\n")
        for line in set(bare).difference(plans):
            plans[line] = _plan(line)
        layout = self._layout or Layout()
        for raw, plan in [(raw, plan) for raw, line in zip(lines, bare, strict=True) if (plan := plans[line])]:
            messages = layout.messages(raw[:MAX_LINE].decode("utf-8", "replace"))
            if raw is last and messages:
                messages[-1] = messages[-1]._replace(cut=True)
            for message in messages:
                self._take(message, plan)
        if len(plans) > _PLANS:
            plans.clear()

    # -- messages ---------------------------------------------------------------------------------------------------

    def _dispatch(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if plan := self._planned(message.text.encode("utf-8", "replace")):
                self._take(message, plan)

    def _planned(self, text: bytes) -> Plan:
        bare = text.translate(None, _DIGITS)
        plan = self._plans.get(bare)
        if plan is None:
            plan = self._plans[bare] = _plan(bare)
            if len(self._plans) > _PLANS:
                self._plans.clear()
        return plan

    def _fold(self, raw: bytes) -> None:
        """Take a line of a log whose lines were broken; rows that went together and hold no sign are not unwrapped."""
        layout, joiner = self._layout, self._joiner
        if layout is None or joiner is None:
            return
        if layout.width:
            self._rows.append(raw)
            full = len(raw) == layout.width if raw.isascii() else len(raw.decode("utf-8", "replace")) == layout.width
            if full and len(self._rows) < _ROWS:
                return
            rows, self._rows = self._rows, []
            outer = len(layout.outer)
            if self._planned(b"".join((rows[0], *(row[outer:] for row in rows[1:])))):
                self._unfold(rows, joiner)
            else:
                self._dispatch(joiner.finish())
        else:
            self._unfold([raw], joiner)

    def _unfold(self, rows: list[bytes], joiner: Joiner) -> None:
        for row in rows:
            self._dispatch(joiner.feed(row.decode("utf-8", "replace")))

    def _take(self, message: Message, plan: Plan) -> None:
        writer = self._writers.get(message.origin)
        if writer is None:
            if len(self._writers) >= _WRITERS:
                message = message._replace(origin=next(iter(self._writers)))
                writer = self._writers[message.origin]
            else:
                writer = self._writers[message.origin] = _Writer(self._numbers())
        text, taken, known = message.text, False, False
        writer.llama.note(message)
        if writer.vllm.continues(message):
            return
        last = None
        for row in plan:
            take = row.take
            if take is last or not (row.sign in text or (message.fields and _holds(message.fields, row.sign))):
                continue
            if row.role == "failure" and taken and row.reader == "llama":
                continue
            last = take
            self._spoke[row.reader] += row.role == "fact"
            if take(writer.llama if row.reader == "llama" else writer.vllm, message):
                known, taken = True, taken or row.role != "noise"
        if not known and _MEMORY.search(text):
            self._note_unread(text)

    def _numbers(self) -> Iterator[int]:
        while True:
            self._last += 1
            yield self._last

    def _note_unread(self, text: str) -> None:
        count, samples = self._unread.get(self._last, (0, ()))
        if self._tell is not None:
            self._tell(text)
        if len(samples) < _SAMPLES:
            samples = (*samples, text[:200])
        if self._last in self._unread or len(self._unread) < _MOST_LOADS:
            self._unread[self._last] = (count + 1, samples)


def _plan(line: bytes) -> Plan:
    """Who may take a line: everybody whose sign it holds. A line with a size is looked at, whether or not anybody knows it."""
    text = line.decode("latin-1")
    wordless = [one for one in _WORDLESS if one[1] in text]
    if "\\" in text:
        text = text.replace("\\n", "\n").replace("\\t", "\t").replace("\\u", "\n")
    words = _INDEX.keys() & _WORD.findall(text)
    rows = [one for word in words for one in _INDEX[word] if one[1] in text]
    rows += wordless
    if not rows:
        return (_UNKNOWN,) if any(unit in text for unit in _UNITS) else ()
    rows.sort()
    return () if rows[-1][2].role == "noise" else tuple(row for _, _, row in rows)


def _holds(fields: dict[str, Any], sign: str) -> bool:
    return sign in fields or fields.get("type") == sign


def read_chunks(chunks: Iterable[bytes], unread: Callable[[str], None] | None = None) -> LogReading:
    """What a log says; ``unread`` is called with each line that speaks of memory and was not understood."""
    reader = LogReader(unread)
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def parse_chunks(chunks: Iterable[bytes]) -> list[LoadFacts]:
    """The loads that a log tells of, in its order."""
    return read_chunks(chunks).loads


def parse_log(data: bytes | str) -> list[LoadFacts]:
    """The loads that a whole log tells of, in its order."""
    return parse_chunks([data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data])


def _sum(parts: Iterable[tuple[int, tuple[str, ...]]]) -> Unread:
    parts = list(parts)
    samples = tuple(itertools.chain.from_iterable(samples for _, samples in parts))[:_SAMPLES]
    return Unread(count=sum(count for count, _ in parts), samples=samples)
