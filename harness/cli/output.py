"""What a command returns, and the one function that prints it and ends the program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import click
import msgspec

from harness.errors import EngineError, HarnessError
from harness.text import clean


class CommandResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended.

    ``data`` is the document's; ``text`` makes what people read on standard output in its place, strings and what rich can draw;
    ``notes`` go to standard error. A ``failure`` decides the exit code; ``errors`` are only for the document.
    """

    data: Mapping[str, Any] = {}
    text: Callable[[], Iterable[object]] = tuple
    notes: tuple[str, ...] = ()
    warnings: Iterable[str] = ()
    exit_code: int = 0
    errors: tuple[dict[str, Any], ...] = ()
    failure: HarnessError | None = None
    command: str = "harness"
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
    for text in result.warnings:
        warn(text)
    for line in error.tail if isinstance(error, EngineError) else ():
        click.echo(click.style(f"  | {clean(line)}", dim=True), err=True, color=colour())
    hint = clean(error.hint) if error is not None and error.hint else None
    if not result.as_json:
        show(result.text())
    elif error is None:
        click.echo(envelope(result.command, result.data, result.exit_code, result.errors))
    else:
        one = {"code": error.code, "message": clean(error.message), "hint": hint}
        click.echo(envelope(result.command, result.data, error.exit_code, (one,)))
    for note in result.notes:
        click.echo(note, err=True)
    if error is not None and not result.as_json:
        click.echo(click.style("error: ", fg="red", bold=True) + clean(error.message), err=True, color=colour())
        if hint:
            click.echo(click.style("hint: ", fg="cyan") + hint, err=True, color=colour())


def closed() -> NoReturn:
    """End because the reader of standard output has gone (``| head``), which is no failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def show(items: Iterable[object]) -> None:
    """Print strings as they are, and what rich can draw by rich."""
    for item in items:
        if isinstance(item, str):
            click.echo(item, nl=not item.endswith("\n"))
        else:
            from harness.render.tables import console

            console().print(item)


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
    click.echo(click.style("warning: ", fg="yellow") + clean(text), err=True, color=colour())
