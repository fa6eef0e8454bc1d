"""Settings: flags > ``HARNESS_*`` > ``harness.toml`` > defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from harness import options
from harness.errors import ConfigError

#: Environment variables that are no settings of commands.
_OTHERS: Final = frozenset({"HARNESS_ENDPOINT", "HARNESS_CONTEXT", "HARNESS_REQUIRE", "HARNESS_CI_DOCKERD"})


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
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    return values


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
