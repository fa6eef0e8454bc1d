"""Settings: flags > ``HARNESS_*`` > ``harness.toml`` > defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from harness import options
from harness.errors import ConfigError, UsageError

#: No configuration is larger, bytes, and no number in one.
_LARGEST_FILE: Final = 1 << 20
_LARGEST_NUMBER: Final = 1e12
#: Environment variables that are no settings of commands.
_OTHERS: Final = frozenset({"HARNESS_ENDPOINT", "HARNESS_CONTEXT", "HARNESS_REQUIRE", "HARNESS_CI_DOCKERD"})


def variable(environment: Mapping[str, str], name: str) -> str | None:
    """A ``HARNESS_…`` variable; ``None`` where it is not set.

    Raises:
        UsageError: it is set and empty. That is a script's own variable which was not set: the default would answer a question
            that was not asked (this machine's memory instead of a card's, another store).
    """
    value = environment.get(name)
    if value == "":
        raise UsageError(f"{name} is empty", hint="give it a value, or unset it", code="empty-variable")
    return value


def find_file(here: Path) -> Path | None:
    """The nearest ``harness.toml`` of this folder and its parents."""
    return next((folder / "harness.toml" for folder in (here, *here.parents) if (folder / "harness.toml").is_file()), None)


def read_file(path: Path | None) -> dict[str, Any]:
    """The settings of a file.

    Raises:
        ConfigError: not TOML, an unknown key, or a value of the wrong type.
    """
    if path is None:
        return {}
    import tomllib

    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ConfigError(f"{path} is too large for a configuration", code="bad-config")
        values = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", code="bad-config") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", code="bad-config") from error
    known = options.settings()
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {key!r}", hint=f"known keys: {', '.join(sorted(known))}", code="unknown-key"
            )
        if not isinstance(value, known[key].written) or isinstance(value, bool):
            raise ConfigError(f"{path}: {key} has the wrong type: {value!r}", code="bad-config")
        if not all(map(_is_sane, value if isinstance(value, list) else [value])):
            raise ConfigError(f"{path}: {key} is out of range: {value!r}", code="bad-config")
    return values


def _is_sane(value: object) -> bool:
    """A text without control characters, or a number that can be calculated with."""
    if isinstance(value, str):
        return value.isprintable()
    return isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER


def unknown_variables(environment: dict[str, str]) -> list[str]:
    """``HARNESS_…`` variables that mean nothing."""
    known = {one.variable for one in options.settings().values()} | _OTHERS
    return sorted(name for name in environment if name.startswith("HARNESS_") and name not in known)


def settings(environment: dict[str, str], here: Path) -> dict[str, tuple[Any, str]]:
    """Every setting that is set below the command line, with where it came from."""
    path = find_file(here)
    found = {key: (value, str(path)) for key, value in read_file(path).items()}
    for key, one in options.settings().items():
        if one.variable and environment.get(one.variable):
            found[key] = (environment[one.variable], one.variable)
    return found


def gpu_of(environment: dict[str, str], here: Path, question: Mapping[str, Any]) -> str | None:
    """The GPUs that a question is about: its own, else those that a start from here would have; ``None``: all.

    Memory of another machine (``available``) is of no GPU here.

    Raises:
        UsageError: ``HARNESS_GPUS`` is empty. ConfigError: the file's.
    """
    if question.get("gpu") or question.get("available"):
        return question.get("gpu")
    variable(environment, "HARNESS_GPUS")
    value = str(settings(environment, here).get("gpus", ("all", ""))[0])
    return None if value == "all" else value


def of_question(environment: dict[str, str], here: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``QueryOptions``: what was given, else the settings that are not at their default.

    Raises:
        UsageError: a variable is empty, or a value cannot be. ConfigError: the file's.
    """
    import msgspec

    found, written = {}, settings(environment, here)
    for name, one in options.declarations(options.QueryOptions).items():
        if not one.variable or (variable(environment, one.variable) is None and name not in written):
            continue
        value = written[name][0]
        try:
            read = one.option.read if isinstance(value, str) else None
            value = read(value) if read else msgspec.convert(value, one.kind, strict=False)
            one.validate(value)
        except ValueError as error:
            raise UsageError(f"{one.variable} or {name} of harness.toml: {error}", code=one.option.code) from error
        if value != one.default:
            found[one.field] = value
    found |= given
    gpu = gpu_of(environment, here, found)
    return found if gpu is None else {**found, "gpu": gpu}
