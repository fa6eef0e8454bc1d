"""What a command returns, and the one function that prints it and ends the program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NoReturn, TextIO

import click
import msgspec

from harness.errors import EngineError, HarnessError
from harness.render.tables import Drawn, Verbatim, wrap
from harness.text import clean

#: How the command begins that a warning about an older calibration ends with.
_AGAIN: Final = ": harness recalibrate "
#: Columns of a terminal that does not say how wide it is.
_USUAL: Final = 80


class CommandResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended.

    ``data`` is the document's; ``text`` makes what people read on standard output in its place, sentences and what can
    be drawn; ``notes`` go to standard error. ``ids`` are what
    ``-q`` prints instead of a list. A ``failure`` decides the exit code; ``errors`` are only for the document.
    """

    data: Mapping[str, Any] = {}
    text: Callable[[], Iterable[str | Drawn]] = tuple
    notes: tuple[str, ...] = ()
    warnings: Iterable[str] = ()
    exit_code: int = 0
    errors: tuple[dict[str, Any], ...] = ()
    failure: HarnessError | None = None
    ids: tuple[str, ...] | None = None
    command: str = "harness"
    quiet: bool = False
    as_json: bool = False


def finish(result: CommandResult) -> NoReturn:
    """Print a result, as one JSON document or for people, and end with its exit code."""
    try:
        _print(result)
    except BrokenPipeError:
        closed()
    sys.exit(result.exit_code if result.failure is None else result.failure.exit_code)


def _print(result: CommandResult) -> None:
    error = result.failure
    for text in gathered(result.warnings):
        warn(text)
    for line in error.tail if isinstance(error, EngineError) else ():
        click.echo(click.style(f"  | {clean(line)}", dim=True), err=True, color=colour())
    hint = clean(error.hint) if error is not None and error.hint else None
    if not result.as_json:
        show(map(Verbatim, result.ids) if result.quiet and result.ids is not None else result.text())
    elif error is None:
        click.echo(envelope(result.command, result.data, result.exit_code, result.errors))
    else:
        one = {"code": error.code, "message": clean(error.message), "hint": hint}
        click.echo(envelope(result.command, result.data, error.exit_code, (one,)))
    for note in result.notes:
        click.echo(note, err=True)
    if error is not None and not result.as_json:
        say("error: ", error.message, "red", bold=True)
        if hint:
            say("hint: ", hint, "cyan")


def gathered(warnings: Iterable[str]) -> Iterator[str]:
    """Warnings of which those that end with the same command for other calibrations are one, for all that are stale."""
    groups: dict[str, list[str]] = {}
    for text in dict.fromkeys(warnings):
        before, command, after = text.partition(_AGAIN)
        groups.setdefault(before + command, []).append(after)
    for before, names in groups.items():
        if len(names) == 1:
            yield before + names[0]
        else:
            _, option, store = names[0].partition(" --store ")
            whose = before.replace("calibrated with", f"{len(names):,} calibrations were made with", 1)
            yield f"{whose}--stale{option}{store}"


def closed() -> NoReturn:
    """End because the reader of standard output has gone (``| head``), which is no failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def show(items: Iterable[str | Drawn]) -> None:
    """Print sentences and what is drawn on standard output, in the width that it has."""
    width = width_of(sys.stdout)
    for item in items:
        for line in wrap(item, width, "  ") if isinstance(item, str) else item.lines(width):
            click.echo(line, color=colour())


def width_of(stream: TextIO) -> int | None:
    """The columns of a terminal, or what ``COLUMNS`` asks for; ``None``: a pipe or a file, where nothing is wrapped."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isascii() and asked.isdigit() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL if stream.isatty() else None
    except (OSError, ValueError):
        return None


def say(head: str, text: str, look: str, *, bold: bool = False) -> None:
    """A sentence on standard error behind a word in colour."""
    sentence = click.style(head, fg=look, bold=bold) + clean(text)
    for line in wrap(sentence, width_of(sys.stderr), "  "):
        click.echo(line, err=True, color=colour())


def colour() -> bool | None:
    """``False`` where colours are not wanted (no-color.org, a dumb terminal); ``None``: as the stream is."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def envelope(command: str, data: Mapping[str, Any], exit_code: int = 0, errors: tuple[dict[str, Any], ...] = ()) -> str:
    """The one document that ``--json`` prints; ASCII alone, so that no locale and no file name can spoil it."""
    return json.dumps(
        {
            "version": 1,
            "command": command,
            "status": "error" if errors else "ok",
            "exit_code": exit_code,
            "data": data,
            "errors": list(errors),
        },
        indent=2,
        allow_nan=False,
    )


def warn(text: str) -> None:
    """A warning on stderr."""
    say("warning: ", text, "yellow")
