"""The last lines of a log, fit for a terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

#: Enough of a log's end for the last lines of any engine, bytes.
_WINDOW: Final = 64 << 10
#: Escape sequences (ECMA-48 CSI and OSC), then every control character that is left, C1 included.
_ESCAPES: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """``text`` without escape sequences and control characters; tabs become spaces."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).replace("\t", " ")


def last_lines(log: Path, count: int = 20, width: int = 400) -> tuple[str, ...]:
    """The last ``count`` non-empty lines of ``log``, cut to ``width`` characters; none where it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _WINDOW))
            data = file.read()
    except OSError:
        return ()
    lines = (printable(line)[:width].rstrip() for line in data.decode("utf-8", "replace").splitlines())
    return tuple([line for line in lines if line][-count:])
