"""``harness parse``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from harness.cli.context import as_json, command
from harness.cli.output import CommandResult
from harness.errors import BadInputError, NotFoundError, NotPermittedError
from harness.logs import LogReading, read_chunks, unreadable
from harness.render.loads import loads_text
from harness.render.tables import Verbatim
from harness.text import clean

if TYPE_CHECKING:
    pass

_CHUNK = 1 << 20


@click.command()
@click.argument("log")
@click.option("--unread", is_flag=True, help="Print the lines that mention memory and were not understood.")
@command
def cli(log: str, unread: bool) -> CommandResult:
    """What an engine's LOG says about each load ("-" reads standard input)."""
    lines: list[str] = []
    reading = read_log(log, (lambda line: lines.append(clean(line))) if unread else None)
    data = {"loads": [facts.to_json() for facts in reading.loads], "unread": msgspec.to_builtins(reading.unread)}
    failure = None
    if not reading.loads and reading.unread.count:
        message, hint = unreadable(reading)
        failure = BadInputError(message, hint=hint, code="no-load")
    if unread:
        return CommandResult(
            data=data, text=lambda: map(Verbatim, lines), notes=tuple(lines) if as_json() else (), failure=failure
        )
    return CommandResult(data=data, text=partial(loads_text, reading.loads) if failure is None else tuple, failure=failure)


def read_log(log: str, unread: Callable[[str], None] | None = None) -> LogReading:
    """What a log file says, "-" for standard input; ``unread`` is called with each line of memory that was not understood.

    Raises:
        NotFoundError, NotPermittedError: the file.
    """
    try:
        return read_chunks(_chunks(log), unread)
    except FileNotFoundError as error:
        raise NotFoundError(f"no such log: {log}", code="no-such-file") from error
    except OSError as error:
        raise NotPermittedError(f"{log} cannot be read: {error.strerror}") from error


def _chunks(log: str) -> Iterator[bytes]:
    with sys.stdin.buffer if log == "-" else Path(log).open("rb") as file:
        while block := file.read(_CHUNK):
            yield block
