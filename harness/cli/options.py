"""Options of the command line, made from their declarations in :mod:`harness.options`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import msgspec

from harness.options import Allowed, CalibrationOptions, Declaration, QueryOptions, RunOptions, declarations

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Text(click.ParamType[Any]):
    """Text of the command line, the environment or harness.toml that is read and validated."""

    def __init__(self, name: str, read: Callable[[str], Any] | None, check: Callable[[Any], None] | None = None) -> None:
        self.name, self._read, self._check = name, read, check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value; a default is one already."""
        try:
            found = self._read(str(value)) if self._read is not None and isinstance(value, str | int) else value
            if self._check is not None:
                self._check(found)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """GPUs, where the option is one."""
        if not self.name.startswith("gpu"):
            return []
        from harness.cli.completion import gpus

        return gpus(incomplete)


def _made(declaration: Declaration, changes: dict[str, Any]) -> Decorator:
    option = declaration.option
    more: dict[str, Any] = {
        "envvar": declaration.variable, "metavar": option.metavar, "help": option.help, "default": declaration.default,
    }  # fmt: skip
    if isinstance(declaration.default, bool):
        more |= {"is_flag": True, "metavar": None}
        if declaration.default:
            more["flag_value"] = False
    elif isinstance(declaration.default, dict):
        item = Text(declaration.name, option.read)
        more |= {"multiple": True, "type": item, "default": (), "callback": lambda _c, _o, pairs: dict(pairs)}
    elif option.choices:
        more |= {"type": click.Choice(option.choices)}
    elif option.read is None and option.least is not None:
        whole = not isinstance(declaration.default, float)
        more["type"] = click.IntRange(option.least, option.most) if whole else click.FloatRange(option.least, option.most)  # type: ignore[arg-type]
    else:
        kind = Text(declaration.name, option.read, declaration.validate)
        more |= {"type": kind, "default": option.spelled_default or declaration.default or None}
    if "type" in more and isinstance(more["type"], click.IntRange) and more["metavar"] is None:
        more["metavar"] = "N"
    more |= {"show_default": more["default"] not in (None, ()) and not isinstance(more["default"], bool), **changes}
    if more["default"] is None:
        del more["default"]  # given as None it would count as a value of a required option
    return click.option(declaration.flag, declaration.field, **more)


def options_of(kind: type[msgspec.Struct], *names: str, **helps: str | dict[str, Any]) -> Decorator:
    """The named options of a class, in this order; ``helps`` replace a help text, or several keywords of ``click.option``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            change = helps.get(name, {})
            function = _made(declarations(kind)[name], {"help": change} if isinstance(change, str) else change)(function)
        return function

    return decorate


def run_options(*names: str, **helps: str | dict[str, Any]) -> Decorator:
    """Options of how something is measured or started."""
    return options_of(RunOptions, *(names or [name for name in declarations(CalibrationOptions) if name != "model"]), **helps)


def query_options(*names: str, **helps: str | dict[str, Any]) -> Decorator:
    """Options of a question about calibrations."""
    return options_of(QueryOptions, *names, **helps)


#: ``--store DIR``.
store_option = query_options("store")
#: Settings that the calibration which answers has to have.
settings_options = query_options(
    "variant", "kv_cache_type", "flash_attention", "num_batch",
    variant="This variant of the calibration, whatever differs.",
    kv_cache_type="The calibration with this KV cache: f16, q8_0, q8_0/f16 (K/V), …",
    flash_attention="The calibration with flash attention on or off; auto: whichever there is.",
    num_batch={"help": "The calibration with this physical batch.", "default": None, "show_default": False, "metavar": "N"},
)  # fmt: skip


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which of a model's calibrations answers."""
    return query_options("engine")(settings_options(function))


#: A placement that is asked for.
PLACING = ("gpu_layers", "n_cpu_moe", "fit", "reserve", "host_available")


def trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What files may set beyond the list; read them with :func:`allowed_of`."""
    function = click.option("--allow-model", is_flag=True, help="Take weights from the place that the file names.")(function)
    function = click.option("--allow-image", is_flag=True, help="Start the image that the file names, by its digest.")(function)
    return click.option(
        "--allow-env", multiple=True, metavar="NAME", help="Hand the engine this variable of the file, whatever it does."
    )(function)


def allowed_of(given: dict[str, Any]) -> Allowed:
    """What :func:`trust_options` allow."""
    return Allowed(
        env=frozenset(given["allow_env"]),
        image=given["allow_image"],
        model=given["allow_model"],
        binary=given.get("allow_binary", False),
    )
