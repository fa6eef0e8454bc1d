"""The envelope of ``--json``, and how results and errors reach a person."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

import click

from harness.errors import EngineError, HarnessError
from harness.text import clean


def colour() -> bool | None:
    """``False`` where nobody wants colours (no-color.org, a dumb terminal); ``None``: as the stream is."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def envelope(command: str, data: dict[str, Any], exit_code: int = 0, errors: tuple[dict[str, Any], ...] = ()) -> str:
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


class Output:
    """Where a command's result goes: a JSON document, or text."""

    def __init__(self, command: str, as_json: bool) -> None:
        self.command, self.as_json = command, as_json

    def done(self, data: dict[str, Any], exit_code: int = 0, errors: tuple[dict[str, Any], ...] = ()) -> NoReturn:
        """Print the document (with ``--json``) and end."""
        if self.as_json:
            click.echo(envelope(self.command, data, exit_code, errors))
        sys.exit(exit_code)

    def failed(self, error: HarnessError, data: dict[str, Any] | None = None) -> NoReturn:
        """Say what went wrong, and end with its status."""
        for line in error.tail if isinstance(error, EngineError) else ():
            click.echo(click.style(f"  | {clean(line)}", dim=True), err=True, color=colour())
        if self.as_json:
            one = {
                "code": error.code,
                "message": clean(error.message),
                "hint": clean(error.hint) if error.hint else None,
            }
            click.echo(envelope(self.command, data or {}, error.exit_code, (one,)))
        else:
            click.echo(click.style("error: ", fg="red", bold=True) + clean(error.message), err=True, color=colour())
            if error.hint:
                click.echo(click.style("hint: ", fg="cyan") + clean(error.hint), err=True, color=colour())
        sys.exit(error.exit_code)

    def closed(self) -> NoReturn:
        """Whoever read standard output has gone (``| head``), which is no failure."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

    def warn(self, text: str) -> None:
        """A warning on stderr."""
        warn(text)


def warn(text: str) -> None:
    """A warning on stderr."""
    click.echo(click.style("warning: ", fg="yellow") + clean(text), err=True, color=colour())
