"""Step 1: bytes to lines of text, whatever their encoding and line ends. Nothing here knows what a line says."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Final

#: Longest line that is looked at, bytes: no fact stands further right.
MAX_LINE: Final = 65536
#: Bytes that are handled at once, so that memory stays flat.
BLOCK: Final = 1 << 20
#: Bytes that show the encoding.
_PROBE: Final = 1024
_MARKS: Final = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


class TextLines:
    """Takes bytes of any number; gives blocks of whole lines in UTF-8, without the last newline of each."""

    def __init__(self) -> None:
        self._probe: bytes | None = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._rest = b""
        self._skipping = False
        #: What the bytes were, where that is not UTF-8.
        self.encoding: str | None = None
        #: Whether the last line lacked its newline: it may have been cut.
        self.cut = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The blocks that are complete with these bytes."""
        if self._probe is not None:
            self._probe += data
            if len(self._probe) < _PROBE:
                return
            data = self._begin()
        for start in range(0, len(data), BLOCK):
            yield from self._lines(self._decode(data[start : start + BLOCK]))

    def finish(self) -> Iterator[bytes]:
        """What is left."""
        if self._probe is not None:
            yield from self._lines(self._decode(self._begin()))
        if self._rest:
            self.cut = True
            yield self._rest
            self._rest = b""

    def _begin(self) -> bytes:
        data, self._probe = self._probe or b"", None
        encoding = "utf-8"
        for mark, name in _MARKS:
            if data.startswith(mark):
                data, encoding = data[len(mark) :], name
                break
        else:
            even, odd = data[:_PROBE:2].count(0), data[1:_PROBE:2].count(0)
            if max(even, odd) > len(data[:_PROBE]) // 8 and min(even, odd) * 8 < max(even, odd):
                encoding = "utf-16-le" if odd > even else "utf-16-be"
        if encoding != "utf-8":
            self._decoder, self.encoding = codecs.getincrementaldecoder(encoding)("replace"), "utf-16"
        return data

    def _decode(self, data: bytes) -> bytes:
        if self._decoder is not None:
            data = self._decoder.decode(data).encode("utf-8", "replace")
        if b"\0" in data:
            data = data.replace(b"\0", b"")
        return data.replace(b"\r", b"\n") if b"\r" in data else data

    def _lines(self, data: bytes) -> Iterator[bytes]:
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return
            self._skipping = False
        end = data.rfind(b"\n")
        if end < 0:
            self._rest += data
        else:
            yield self._rest + data[:end]
            self._rest = data[end + 1 :]
        if len(self._rest) > MAX_LINE:
            yield self._rest[:MAX_LINE]
            self._rest, self._skipping = b"", True
