"""What every command shares: settings, the store, the catalog."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.output import CommandResult, warn
from harness.errors import HarnessError
from harness.options import settings
from harness.store.config import find_file, read_file, unknown_variables
from harness.store.store import Store, default_root


def store_at(path: str | None) -> Store:
    """The store that was asked for, or the default one."""
    return Store(Path(path) if path else default_root(dict(os.environ), Path.cwd()))


def command(function: Callable[..., CommandResult]) -> Callable[..., CommandResult]:
    """Give a command ``--json``, and its errors the form of a result."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, also on failure.")
    @wraps(function)
    def wrapper(*args: Any, as_json: bool, **kwargs: Any) -> CommandResult:
        name = click.get_current_context().info_name or function.__name__
        try:
            result = function(*args, **kwargs)
        except HarnessError as error:
            result = CommandResult(failure=error)
        return msgspec.structs.replace(result, command=name, as_json=as_json)

    return wrapper


def as_json() -> bool:
    """Whether the command that runs was asked for a JSON document."""
    return bool(click.get_current_context().params["as_json"])


def load_settings(context: click.Context) -> None:
    """Put harness.toml under the flags; warn about variables that mean nothing."""
    values = read_file(find_file(Path.cwd()))
    known = settings()
    flat = {known[key].field: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    if isinstance(context.command, click.Group):
        context.default_map = dict.fromkeys(context.command.list_commands(context), flat)
    for name in unknown_variables(dict(os.environ)):
        warn(f"unknown variable {name} is ignored")


def wants_json() -> bool:
    """Whether the command line asks for JSON, before it has been parsed."""
    return "--json" in sys.argv[1:]
