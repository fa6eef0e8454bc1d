"""What every command shares: settings, the store, the catalog."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.core import ParameterSource

from harness import __version__
from harness.cli.output import CommandResult, warn
from harness.errors import HarnessError, UsageError, refuse_other_systems
from harness.options import SAME_SETTING, settings
from harness.render.tables import Drawn, Verbatim
from harness.store.config import find_file, gpu_of, read_file, unknown_variables, variable
from harness.store.config import settings as set_values
from harness.store.store import Store, default_root
from harness.text import clean
from harness.units import is_context, split_context


def store_at(path: str | None) -> Store:
    """The store that was asked for, or the default one."""
    return Store(Path(path) if path else default_root(dict(os.environ), Path.cwd()))


#: Verbs that start engines, read what processes hold, or look for what those have left.
_LINUX_ALONE: Final = frozenset({"bisect", "calibrate", "clean", "doctor", "recalibrate", "serve", "sweep"})


#: A command that a text ends with, and the verbs that have no store.
_NAMED: Final = re.compile(r"(?:^|: |^next +)harness (?P<verb>[a-z]+)(?: (?:[^:;]|:(?! ))*)?$")
_WITHOUT_STORE: Final = frozenset({"completion", "help", "parse"})


def command(function: Callable[..., CommandResult]) -> Callable[..., CommandResult]:
    """Give a command ``--json``, and its errors the form of a result."""

    @click.option("-v", "--verbose", is_flag=True, help="Also print the store and the settings in use.")
    @click.option("-q", "--quiet", is_flag=True, help="Print results only: ids of lists, no progress.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, also on failure.")
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> CommandResult:
        as_json, quiet, verbose = (kwargs.pop(name) for name in ("as_json", "quiet", "verbose"))
        context = click.get_current_context()
        name, everywhere = context.info_name or function.__name__, context.find_root().params
        typed = _typed_store(context)
        if "store" in kwargs and typed:
            kwargs["store"] = typed
        try:
            _refuse_empty(context)
            if "gpu" in kwargs:
                kwargs["gpu"] = gpu_of(dict(os.environ), Path.cwd(), kwargs)
            if name in _LINUX_ALONE:
                refuse_other_systems()
            result = function(*args, **kwargs)
        except HarnessError as error:
            result = CommandResult(failure=error)
        if typed:
            result = _repeating(result, repeated(context))
        notes = (*result.notes, *_origins(kwargs.get("store"))) if verbose or everywhere.get("verbose") else result.notes
        quiet = quiet or bool(everywhere.get("quiet"))
        return msgspec.structs.replace(result, command=name, as_json=as_json, quiet=quiet, notes=notes)

    return wrapper


def _typed_store(context: click.Context) -> str | None:
    typed = context.params.get("store") if context.get_parameter_source("store") is ParameterSource.COMMANDLINE else None
    return typed or context.find_root().params.get("store")


def repeated(context: click.Context) -> Callable[[str], str]:
    """What puts the store that was typed behind the command of ours that a text ends with; without one, texts stay."""
    typed = _typed_store(context)
    option = f" --store {shlex.quote(typed)}" if typed else ""

    def text_of(text: str) -> str:
        named = _NAMED.search(text)
        return text if named is None or option in named[0] or named["verb"] in _WITHOUT_STORE else text + option

    return text_of


def _repeating(result: CommandResult, repeated: Callable[[str], str]) -> CommandResult:
    """The result with an option of the question behind each command of ours that it ends with."""

    def lines() -> Iterator[str | Drawn]:
        for item in result.text():
            if isinstance(item, Verbatim):
                yield Verbatim(repeated(item.text))
            else:
                yield repeated(item) if isinstance(item, str) else item

    if result.failure is not None and result.failure.hint:
        result.failure.hint = repeated(result.failure.hint)
    return msgspec.structs.replace(result, text=lines, warnings=tuple(map(repeated, result.warnings)))


def _refuse_empty(context: click.Context) -> None:
    """Refuse an operand that is the empty text, and a variable that is: each would be this folder, this machine, or a default.

    Raises:
        UsageError: there is one.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE or context.find_root().params.get(name)
        if isinstance(parameter.envvar, str) and not typed:
            variable(os.environ, parameter.envvar)
        if not isinstance(parameter, click.Argument):
            continue
        if value == "" or (isinstance(value, tuple) and "" in value):
            what = parameter.make_metavar(context).strip("[").partition("[")[0].rstrip(".]")
            raise UsageError(f"{what} is empty", code="bad-name")


def _origins(store: str | None) -> Iterator[str]:
    """The store and the settings that a command went by."""
    yield f"harness {__version__}, store {store_at(store).root}"
    for name, (value, origin) in sorted(set_values(dict(os.environ), Path.cwd()).items()):
        yield clean(f"setting {name} = {value} ({origin})")


def context_of(model: str, context: Any) -> tuple[str, Any]:
    """The model of ``MODEL[@CTX]``, and its context; else the one that an option gave.

    Raises:
        UsageError: a context that is none.
    """
    try:
        name, found = split_context(model)
    except ValueError as error:
        raise UsageError(f"{model}: {error}", code="bad-context") from error
    return name, context if found is None else found


def without_context(name: str) -> None:
    """Refuse ``MODEL@CTX`` where files are moved or removed: a calibration is of all contexts.

    Raises:
        UsageError: a context stands behind the name.
    """
    head, at, tail = name.rpartition("@")
    if at and is_context(tail):
        raise UsageError(f"{name}: a calibration is of all contexts up to its range", hint=f"leave out @{tail}: {head}")


def is_quiet() -> bool:
    """Whether results alone are wanted: ``-q`` before or behind the verb."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("quiet") or context.find_root().params.get("quiet"))


def as_json() -> bool:
    """Whether the command that runs was asked for a JSON document."""
    return bool(click.get_current_context().params["as_json"])


def load_settings(context: click.Context) -> None:
    """Put harness.toml under the flags; warn about variables that mean nothing."""
    values = read_file(find_file(Path.cwd()))
    known = settings()
    flat = {known[key].field: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    flat |= {option: flat[name] for option, name in SAME_SETTING.items() if name in flat}
    if isinstance(context.command, click.Group):
        context.default_map = dict.fromkeys(context.command.list_commands(context), flat)
    for name in unknown_variables(dict(os.environ)):
        warn(f"unknown variable {name} is ignored")


def wants_json() -> bool:
    """Whether the command line asks for JSON, before it has been parsed."""
    return "--json" in sys.argv[1:]
