"""What every command shares: settings, the store, the catalog."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from harness.cli.output import Output, warn
from harness.errors import HarnessError, UsageError
from harness.store.config import find_file, read_file, unknown_variables
from harness.store.store import Store, default_root


def store_at(path: str | None) -> Store:
    """The store that was asked for, or the default one."""
    return Store(Path(path) if path else default_root(dict(os.environ), Path.cwd()))


def store_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--store DIR``."""
    return click.option("--store", "store", envvar="HARNESS_STORE", metavar="DIR", help="Folder of calibrations and runs.")(
        function
    )


def engine_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--engine`` of verbs that read calibrations."""
    return click.option(
        "--engine",
        type=click.Choice(["auto", "ollama", "llama-server", "vllm"]),
        default=None,
        callback=lambda _context, _option, value: None if value == "auto" else value,
        help="Whose calibration, where several engines have one.",
    )(function)


def guard_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which of a model's calibrations answers; read them with :func:`wanted_of`."""
    function = click.option(
        "--flash-attention", type=click.Choice(["auto", "on", "off"]), default="auto", envvar="HARNESS_FLASH_ATTENTION",
        help="The calibration with this setting.",
    )(function)  # fmt: skip
    function = click.option(
        "--kv-cache-type", envvar="HARNESS_KV_CACHE_TYPE", metavar="T", help="The calibration with this KV cache."
    )(function)
    function = click.option("--variant", metavar="NAME", help="This variant of the calibration, whatever differs.")(function)
    return engine_option(function)


def trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What files may set beyond the list; read them with :func:`allowed_of`."""
    function = click.option("--allow-model", is_flag=True, help="Take weights from the place that the file names.")(function)
    function = click.option("--allow-image", is_flag=True, help="Start the image that the file names, by its digest.")(function)
    return click.option(
        "--allow-env", multiple=True, metavar="NAME", help="Hand the engine this variable of the file, whatever it does."
    )(function)


def allowed_of(given: dict[str, Any]) -> Any:
    """What :func:`trust_options` allow."""
    from harness.store.trust import Allowed

    return Allowed(
        env=frozenset(given["allow_env"]),
        image=given["allow_image"],
        model=given["allow_model"],
        binary=given.get("allow_binary", False),
    )


def wanted_of(given: dict[str, Any]) -> dict[str, Any]:
    """What :func:`guard_options` ask for, as arguments of the public functions."""
    flash = {"on": "enabled", "off": "disabled"}.get(given["flash_attention"])
    return {key: given[key] for key in ("engine", "variant", "kv_cache_type")} | {"flash_attention": flash}


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json`` and an :class:`Output`, and turn our errors into exit codes."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, also on failure.")
    @wraps(function)
    def wrapper(*args: Any, as_json: bool, **kwargs: Any) -> None:
        name = click.get_current_context().info_name or function.__name__
        output = Output(name, as_json)
        try:
            function(*args, output=output, **kwargs)
        except HarnessError as error:
            output.failed(error)
        except BrokenPipeError:
            output.closed()

    return wrapper


def load_settings(context: click.Context) -> None:
    """Put harness.toml under the flags; warn about variables that mean nothing."""
    values = read_file(find_file(Path.cwd()))
    flat = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    if isinstance(context.command, click.Group):
        verbs = context.command.list_commands(context)
        alone = {key: value for key, value in flat.items() if key != "ctx"}  # contexts to load, not the one of a question
        context.default_map = {verb: flat if verb == "calibrate" else alone for verb in verbs}
    for name in unknown_variables(dict(os.environ)):
        warn(f"unknown variable {name} is ignored")


def wants_json() -> bool:
    """Whether the command line asks for JSON, before it has been parsed."""
    return "--json" in sys.argv[1:]


def positive_ints(text: str | None, what: str) -> tuple[int, ...]:
    """A comma list of whole numbers above zero.

    Raises:
        UsageError: anything else.
    """
    if not text:
        return ()
    numbers = []
    for part in str(text).split(","):
        word = part.strip().replace("_", "")
        if not (word.isascii() and word.isdigit()) or int(word) < 1 or int(word) > 1 << 31:
            raise UsageError(f"{what} takes whole numbers above zero, not {part.strip()!r}")
        numbers.append(int(word))
    return tuple(numbers)
