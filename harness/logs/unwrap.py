"""Step 2: lines of text to messages: what a program wrote, without what collectors, terminals, exports and pages put around it.

Nothing here knows an engine. A record of JSON or CSV gives its message by the name of its field, else its longest text; what
stands before a message goes by its shape (times, hosts, quotes, bullets, names of containers), or because nearly every line of
the log begins with it. Lines that a terminal or a mailer folded are put together again.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from harness.logs.folds import HEAD, masked, open_quote, width_of
from harness.logs.records import DEEPEST, cells_of, column, texts, unescape


class Message(NamedTuple):
    """One message: its text, the record that it stood in, which of several writers in one log wrote it, and its program's name.

    ``cut``: it stands at the end of a log that lacks its last newline, and may have lost its own end.
    """

    text: str
    fields: dict[str, Any] | None = None
    origin: str = ""
    program: str = ""
    cut: bool = False


_SURE: Final = re.compile(
    r'"(?:log|@?message|Message|MESSAGE|msg|line|Line|textPayload|_raw|LogMessage|logMessage|stringValue|body)"\s{0,8}:\s{0,8}"((?:[^"\\]|\\.)*+)"?'
)
#: Colours and cursor movements; the escape itself may be lost, or be spelled out.
_COLOUR: Final = re.compile(
    r"(?:\x1b|\^\[|\u241b|\ufffd|\\x1[bB]|\\u001[bB]|\\0?33|\\e|#033)\[[\d;?]{0,16}[A-Za-z]"
    r"|\x1b\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|\x1b[()][0-9A-B]"
    r"|\[\d{1,3}(?:;\d{1,3}){0,4}m|[\x00-\x08\x0b\x0c\x0e-\x1b]"
)
_ENTITY: Final = re.compile(r"&(?:#\d{1,6}|#x[\da-fA-F]{1,5}|quot|amp|lt|gt|apos|nbsp|lsquo|rsquo|ldquo|rdquo);")
_TAG: Final = re.compile(
    r"</?(?:span|br|code|pre|p|div|td|tr|th|li|ol|ul|b|i|em|strong|a|font|samp|mark)(?:\s[^<>]{0,300})?/?>"
)
_PLAIN: Final = str.maketrans(
    "\u00a0\u2002\u2003\u2009\u202f\u3000\u201c\u201d\u2018\u2019\u00ab\u00bb",
    '      ""\'\'""',
    "\ufeff\u200b\u200c\u200d\u2060\u00ad",
)
_TIME: Final = r"""(?:
    \d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?:(?:[T_,]|,?[ ]|[ ]at[ ])\d{1,2}[:.]\d{2}(?:[:.]\d{2}(?:[.,:]\d{1,9})?)?)?
      (?:[ ]?(?:Z|UTC|GMT|CES?T|[+-]\d\d:?\d\d|[AaPp]\.?[Mm]\.?)\b)?
  | \d{1,2}[-/.]\d{1,2}[-/.]\d{2,4},?[ ]{1,2}\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:[ ][AaPp][Mm])?
  | \d{1,2}[-/.][A-Za-z]{3}[-/.]\d{2,4}[ :]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:[ ][+-]\d{4})?
  | (?:[^\W\d_]{2,4}[.,]?[ ]{1,2})?(?:[^\W\d_]{3,9}\.?|\d{1,2}[^\W\d_])[ ]{1,2}\d{1,2}[^\W\d_]?\.?(?:,?[ ]\d{4})?(?:,|[ ]at)?
      [ ]\d{1,2}:\d{2}:\d{2}(?:[.,]\d{1,9})?(?:[ ](?:\d{4}|[AaPp][Mm]|UTC))?
  | [^\W\d_]{3}[ ]\d{4}-\d\d-\d\d[ ]\d\d:\d\d:\d\d(?:\.\d{1,9})?[ ][A-Z]{3,4}
  | \d{1,2}:\d{2}(?::\d{2}(?:[.,:]\d{1,9})?)?(?:[ ]?[AaPp][Mm]\b)? | \d{1,4}\.\d\d\.\d{3}\.\d{3}(?:[ ][A-Z](?=[ ]))?
  | \d{9,10}[.,]\d{1,9} | \d{10} | \d{13} | \d{16} | \d{19} | T?\+?\d{1,6}(?:\.\d{1,9})?m?s(?=[ :\]|])
)"""
#: What may stand before a message, by its shape; as often as it comes.
_BEFORE: Final = re.compile(
    rf"""\s+ | [>$%\#|*+\u2022\u00b7\u2502\u2503\u258e\u258f\u25cf\u25cb\u2192\u276f]{{1,3}}(?=\s) | >(?=\S)
  | [-\u2013\u2014](?=\s)
  | <\d{{1,3}}>\d?\s? | [\[(]{_TIME}[\])](?:\s?[|,;:-](?=\s))? | {_TIME}(?=[\s|,;:\])]|$)(?:\s?[|,;:](?=\s)|,)?
  | \[?std(?:err|out)\]?(?:\s[FP](?=\s))?\s?[|:,]?(?=\s)\s? | \[(?:pod|container|service)?/[^\]\s]{{1,200}}\]
  | (?:[\w.@/-]{{1,80}}\s)?(?P<program>[\w./@:-]{{1,80}})\[[\w.]{{1,20}}\]:(?=\s)
  | (?:L?\d{{1,7}}:|[/\w.-]{{1,200}}\.(?:log|txt|out):(?:\d{{1,7}}:)?)(?=\D)|L?\d{{1,7}}\s?[|\u2502](?=\s)
  | \[\s{{0,9}}\d{{1,9}}\.\d{{1,9}}\](?=\s) | MESSAGE=
  | [\w.@/-]{{1,80}}\s{{0,30}}\|(?=\s)(?!\s{{0,40}}-?\d{{1,9}}\s{{0,9}}=) | \[(?P<pid>\d{{2,8}})\](?=\s)""",
    re.VERBOSE,
)
_COMPOSED: Final = re.compile(r"\s{0,8}([\w.@/-]{1,80}?)\s{0,30}\|\s")
_LEVELS: Final = frozenset(
    ("INFO", "WARN", "WARNING", "ERROR", "DEBUG", "CRITICAL", "FATAL", "TRACE", "info", "warn", "error", "debug")
)
_TOKEN: Final = re.compile(r"[\[<{]?[\w.@/+-]+[\]>}]?[|>,;:]?")
_FUNCTION: Final = re.compile(r"[A-Za-z_~]\w*:")
#: A line that begins as messages do, and one that holds nothing which could be a wrapping's.
_BARE: Final = re.compile(r"[A-Za-z_~]\w*: |[a-z]{2,8} {1,20}\w{1,40}: ")
_SPECIAL: Final = re.compile(r"[^ !#$%'-;=?-Z^_a-z{}~]")
_RECORD: Final = re.compile(r"\{\s{0,8}\"|\[\s{0,8}[\[{\"]")
_STRING: Final = re.compile(r'\s*"((?:[^"\\]|\\.)*+)",?')
#: A cell in quotes, which only a whole cell has; pairs, of which one holds a message.
_QUOTED_CELL: Final = re.compile(r"""(?:^|[,;\t])"(?:[^"]|"")*"(?=[,;\t]|$)""")
_PAIRS: Final = re.compile(r'\s*(?:[\w.]{1,40}=(?:"(?:[^"\\]|\\.)*+"|\S*)\s+){1,20}')
_NESTED: Final = re.compile(r'\b(?:msg|message|log|line|MESSAGE)="((?:[^"\\]|\\.)*+)"')
_MOST: Final = 10_000


class Layout:
    """How the lines of one log are wrapped, learned from its beginning."""

    def __init__(self, lines: Sequence[str] = ()) -> None:
        self.seen: dict[str, None] = {}
        self._common: re.Pattern[str] | None = None
        self.width = self.inner_width = 0
        #: How messages begin, and what stands before every line, digits as 0; both where lines are broken.
        self.starts: frozenset[str] = frozenset()
        self.outer = ""
        self.folded = self._encoded = False
        self._column: tuple[int, str, int] | None = None
        self._logfmt = False
        if not lines:
            return
        self._column = column(next((line for line in lines if line.strip()), ""))
        nested = [found[1] for line in lines if _PAIRS.match(line) and (found := _NESTED.search(line))]
        heads = sum(bool(HEAD.match(unescape(one))) for one in nested)
        self._logfmt = len(nested) * 2 > len(lines) and heads * 4 > len(nested)
        self._encoded = any('"MESSAGE":[' in line.replace(" ", "") for line in lines)
        rows = [(line, [message.text for message in self.messages(line)]) for line in map(self.clean, lines)]
        self._common = _common([text for _, inner in rows for text in inner])
        if self._common is not None:
            rows = [(line, [message.text for message in self.messages(line)]) for line, _ in rows]
        torn, width, starts = width_of([(line, (inner or [""])[0]) for line, inner in rows])
        inner_torn, inner_width, inner_starts = width_of([(inner[0], inner[0]) for _, inner in rows if len(inner) == 1])
        if torn * 2 >= inner_torn:
            self.width, self.starts = width, starts
            rest = [masked(line) for line, _ in rows if line.strip()]
            first, last = min(rest, default=""), max(rest, default="")
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
            self.outer = "".join(one for one, _ in same)
        else:
            self.inner_width, self.starts = inner_width, inner_starts
        self.folded = any(
            "level=" in text and (open_quote(text) or (after[:1] == " " and not HEAD.match(after) and "=" in after))
            for text, after in zip((one for _, inner in rows for one in inner), [line for line, _ in rows][1:], strict=False)
        )

    @property
    def joins(self) -> bool:
        """Whether lines have to be put together, or hide what they say."""
        return bool(self.width or self.inner_width or self.folded or self._encoded)

    def messages(self, line: str) -> list[Message]:
        """What one line holds: mostly one message; none, or several, where it is a record."""
        if _BARE.match(line) and not _SPECIAL.search(line):
            return [Message(line.rstrip())]
        return [message for message in self._open(line, 0) if message.text]

    def _note(self, what: str) -> None:
        if what not in self.seen:
            self.seen[what] = None

    def _open(self, line: str, depth: int) -> Iterator[Message]:
        text = self.clean(line)
        if depth < DEEPEST and ('"' in text or self._column) and (records := self._records(text, depth)) is not None:
            _, writer, program = self._strip(text)
            origin = writer or (self._origin(text) if "|" in text[:90] else "")
            for inner, fields in records:
                for part in inner.replace("\r", "\n").split("\n"):
                    for message in self._open(part, depth + 1):
                        yield message._replace(
                            fields=message.fields or fields, origin=message.origin or origin, program=message.program or program
                        )
            return
        yield self._bare(text)

    def clean(self, text: str) -> str:
        """A line without colours, entities and tags."""
        if not text.isascii():
            text = text.translate(_PLAIN)
        if ("[" in text or "\x1b" in text or not text.isprintable()) and _COLOUR.search(text):
            self._note("colours")
            text = _COLOUR.sub("", text)
        if "&" in text and _ENTITY.search(text):
            self._note("html")
            text = html.unescape(text)
            if "&" in text and _ENTITY.search(text):
                text = html.unescape(text)
            text = text.replace("\u00a0", " ")
        if "<" in text and _TAG.search(text):
            self._note("html")
            text = _TAG.sub("", text)
        return text

    def _records(self, text: str, depth: int) -> list[tuple[str, dict[str, Any] | None]] | None:
        """The messages of a line of JSON, CSV or key="value" pairs around another program's line; ``None`` if it is none."""
        if depth == 0 and self._column is not None and len(cells := cells_of(text, self._column[1])) == self._column[2]:
            return [(cells[self._column[0]], None)]
        if (begin := _RECORD.search(text)) and text.rstrip(" ,;").endswith(("}", "]")):
            with suppress(ValueError, RecursionError):
                record = json.loads(text[begin.start() :].rstrip(" ,;"))
                found = list(itertools.islice(texts(record, 0), _MOST))
                alone = not self._strip(text[: begin.start()])[0]
                if sure := [(inner, fields) for inner, fields, named in found if named and (alone or fields is record)]:
                    self._note("json")
                    return sure
                if alone:
                    whole = text[begin.start() :].replace('{"', "{ ", 1)
                    longest = max((inner for inner, _, _ in found), key=len, default=whole)
                    return [(longest, record)] if isinstance(record, dict) else [(inner, fields) for inner, fields, _ in found]
        if '":' in text or '" :' in text:  # a piece of a document, or a record that was cut
            pieces = [one for one in _SURE.finditer(text) if len(one[1]) > 1]
            before = self._strip(text[: pieces[0].start()])[0].strip('"{[, :\\') if pieces else ""
            if pieces and (not before or text.lstrip()[:2] in ('{"', '["', "[{")):
                self._note("json")
                return [(unescape(one[1]), None) for one in pieces]
        if text.endswith(('"', '",')) and (string := _STRING.fullmatch(text)):
            return [(unescape(string[1]), None)]
        delimiter = "," if ',"' in text or '",' in text else ";" if ";" in text else "\t"
        if _QUOTED_CELL.search(text) and (cells := cells_of(text, delimiter)):
            best = max(cells, key=lambda cell: (" " in cell, len(cell)))
            if len(cells) > 1 and best != text:
                self._note("csv")
                return [(best, None)]
        if (nested := _NESTED.search(text)) and (self._logfmt or '\\"' in nested[1]):
            inner = unescape(nested[1])
            if HEAD.match(inner) or (self._logfmt and depth == 0):
                self._note("logfmt")
                return [(inner, None)]
        return [(text.replace('\\"', '"'), None)] if '\\"' in text and '=\\"' in text else None

    def _strip(self, text: str) -> tuple[str, str, str]:
        """A text without what stands before it, and the writer and the program that this names."""
        at, writer, program = 0, "", ""
        for _ in range(12):
            found = _BEFORE.match(text, at)
            if found is None or found.end() == at:
                if self._common is None or (found := self._common.match(text, at)) is None or found.end() == at:
                    break
            else:
                writer, program = found["pid"] or writer, found["program"] or program
            at = found.end()
        return text[at:], writer, program

    def _bare(self, text: str) -> Message:
        bare, writer, program = self._strip(text)
        if len(bare) < len(text.lstrip()):
            self._note("prefix")
        if not writer and "|" in text[:90]:
            writer = self._origin(text)
        if bare.endswith(("\\n", "\\r")):
            bare = bare[:-2]
        return Message(bare.rstrip(), None, writer, program or writer)

    def _origin(self, text: str) -> str:
        found = _COMPOSED.match(text)
        return found[1] if found else ""


def _common(texts: Sequence[str]) -> re.Pattern[str] | None:
    """What nearly every message begins with: names of hosts, pods, files, prompts."""
    rows = [text[:200].split(None, 5) for text in texts[:4000]]
    rows = [row for row in rows if len(row) > 1]
    if len(rows) < 8:
        return None
    parts: list[str] = []
    for place in range(4):
        tokens = Counter(re.sub(r"\d+", "0", row[place]) for row in rows if len(row) > place + 1)
        token, count = tokens.most_common(1)[0] if tokens else ("", 0)
        plain = _TOKEN.fullmatch(token) and not _FUNCTION.fullmatch(token) and token.strip("[]<>:|,;") not in _LEVELS
        if count < 0.9 * len(rows) or not plain:
            break
        parts.append(re.escape(token).replace("0", r"\d+"))
    return re.compile(r"\s+".join(parts) + r"(?=\s)") if parts else None
