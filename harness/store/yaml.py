"""A calibration as YAML, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from harness.errors import BadInputError, NotFoundError, NotPermittedError
from harness.model.calibration import Calibration, from_document, to_document

#: What nests YAML within a line. libyaml recurses in C: tens of thousands of them end the whole process.
_NESTING: Final = re.compile(rb"[\[{]|[-?]\s")
_DEEPEST: Final = 10_000
#: Artifacts take a few KiB.
_LARGEST_FILE: Final = 4 << 20


class _Dumper(yaml.SafeDumper):
    """YAML as the artifact has it: strings quoted, no aliases, floats with six decimals at most."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never write anchors."""
        return True


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = value.isprintable() and value.isascii()
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if plain else '"')


def _mapping(dumper: yaml.SafeDumper, value: dict[Any, Any]) -> yaml.MappingNode:
    pairs = [
        (
            yaml.ScalarNode("tag:yaml.org,2002:str", key) if _bare(key) else dumper.represent_data(key),
            dumper.represent_data(item),
        )
        for key, item in value.items()
    ]
    nested = any(isinstance(item, dict | list | tuple) and item for item in value.values())
    flow = (not nested and bool(value) and "base_vram_gb" not in value) or "up_to" in value
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=flow)


def _sequence(dumper: yaml.SafeDumper, value: list[Any] | tuple[Any, ...]) -> yaml.SequenceNode:
    """Figures of many layers on one line."""
    numbers = len(value) > 0 and all(isinstance(item, float) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=numbers)


def _bare(key: Any) -> bool:
    return (
        isinstance(key, str)
        and re.fullmatch(r"[a-z_][a-z0-9_]*", key) is not None
        and key not in ("null", "true", "y", "n", "yes", "no", "on", "off", "false")
    )


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float", f"{value:.6f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.1f}"
    )


_Dumper.add_representer(str, _string)
_Dumper.add_representer(dict, _mapping)
_Dumper.add_representer(float, _float)
_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(tuple, _sequence)


def to_yaml(calibration: Calibration) -> str:
    """The artifact's text; equal calibrations give equal bytes."""
    document = to_document(calibration)
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=4096, allow_unicode=False, default_flow_style=False)


def read_calibration(path: Path) -> Calibration:
    """Read one artifact.

    Raises:
        NotFoundError, NotPermittedError: the file. BadInputError: damaged. ConfigError: a newer schema.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"no such calibration: {path}", code="no-such-file") from error
    except OSError as error:
        raise NotPermittedError(f"{path} cannot be read: {error.strerror}") from error
    return parse_calibration(text, str(path))


def parse_calibration(text: bytes, where: str) -> Calibration:
    """Read the text of an artifact; ``where`` names it in errors.

    Raises:
        BadInputError: damaged. ConfigError: a newer schema.
    """
    if len(text) > _LARGEST_FILE:
        raise BadInputError(f"{where} is no calibration: it is larger than any", code="bad-artifact")
    if len(_NESTING.findall(text)) > _DEEPEST:
        raise BadInputError(f"{where} is no calibration: it is nested too deeply", code="bad-artifact")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        document = yaml.load(text, Loader=loader)  # noqa: S506 - a safe loader, in C where there is one
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadInputError(f"{where} is not YAML: {' '.join(str(error).split())}", code="bad-artifact") from error
    return from_document(document, where)
