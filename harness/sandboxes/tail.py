"""The last lines of a log, fit for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from harness.text import clean

#: Enough of a log's end for the last lines of any engine, bytes.
_WINDOW: Final = 64 << 10


def last_lines(log: Path, count: int = 20, width: int = 400) -> tuple[str, ...]:
    """The last ``count`` non-empty lines of ``log``, cut to ``width`` characters; none where it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _WINDOW))
            data = file.read()
    except OSError:
        return ()
    lines = (clean(line, "")[:width].rstrip() for line in data.decode("utf-8", "replace").splitlines())
    return tuple([line for line in lines if line][-count:])
