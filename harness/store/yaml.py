"""The one reader of YAML, with limits; and a calibration as YAML, and back."""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

import yaml

from harness.engines.registry import is_engine, policy_of
from harness.errors import BadInputError, NotFoundError, NotPermittedError
from harness.files import AT_ONCE, PLAIN
from harness.model.calibration import Calibration, to_document
from harness.model.validation import from_document
from harness.text import one_line
from harness.units import MIB, format_size, from_gib

#: What nests YAML within a line. libyaml recurses in C: tens of thousands of them end the whole process.
_NESTING: Final = re.compile(rb"[\[{]|[-?]\s")
_MOST_NESTING: Final = 10_000
#: What references and tags cannot be written without; and what nests.
_REFERS: Final = re.compile(rb"[&*!]")
_BRACKETS: Final = re.compile(rb"[\[\]{}]")
_INDENTS: Final = re.compile(rb"^[ ?-]*", re.MULTILINE)
#: No document of harness's nests deeper, or has a larger number (a block's bytes, a model's tokens).
_DEEPEST: Final = 16
_LARGEST_NUMBER: Final = 1 << 62
#: Artifacts take a few KiB.
_LARGEST_FILE: Final = 4 << 20


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain values alone: no dates, no numbers to the base of 60, no tags and no references; a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; of a key that stood twice YAML's own takes the last, and a reader the first."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[:80]!r} stands twice", node.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _integer(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    if len(text) > 20 or abs(value := int(text.replace("_", ""), 0 if text[:2].lower() == "0x" else 10)) > _LARGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
    return value


def _fraction(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(node.value).replace("_", "")
    value = math.nan if text.endswith((".inf", ".nan")) else float(text)
    if not math.isfinite(value):
        raise yaml.constructor.ConstructorError(None, None, "a number is not finite", node.start_mark)
    return value


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?|[-+]?\.(?:inf|nan)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _fraction)


def parse_yaml(text: bytes, where: str) -> Any:
    """The plain values of a YAML document: mappings, lists, texts, numbers, switches and nothing. ``where`` names it in errors.

    Raises:
        BadInputError: not YAML in UTF-8, larger or deeper than any of ours, or with tags, references or absurd numbers.
    """
    if len(text) > _LARGEST_FILE:
        raise BadInputError(f"{where} exceeds {_LARGEST_FILE >> 20} MiB", code="bad-yaml")
    if len(_NESTING.findall(text)) > _MOST_NESTING:
        raise BadInputError(f"{where} is nested too deeply", code="bad-yaml")
    try:
        text.decode()  # libyaml takes UTF-16 too, in whose bytes none of this is found
        if _REFERS.search(text) or _depth(text) > _DEEPEST:
            _check_events(text, where)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, in C where there is one
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise BadInputError(f"{where} is not YAML: {one_line(str(error))}", code="bad-yaml") from error


def _depth(text: bytes) -> int:
    """How deep a document may nest, at most, where no text has a bracket: its indents and its brackets."""
    depth = most = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in b"[{" else -1
        most = max(most, depth)
    return most + max(map(len, _INDENTS.findall(text)), default=0)


def _check_events(text: bytes, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise BadInputError(f"{where} has references (& and *), which are not read", code="bad-yaml")
        if getattr(event, "tag", None) is not None:
            raise BadInputError(f"{where} has tags (!), which are not read", code="bad-yaml")
        if depth > _DEEPEST:
            raise BadInputError(f"{where} is nested too deeply", code="bad-yaml")


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        NotFoundError, NotPermittedError: the file. BadInputError: as :func:`parse_yaml`.
    """
    return parse_yaml(_content(path), str(path))


def _content(path: Path) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | AT_ONCE | PLAIN), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInputError(f"{path} is not a plain file", code="bad-yaml")
            return file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {path}", code="no-such-file") from error
    except PermissionError as error:
        raise NotPermittedError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", code="bad-yaml") from error


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
    flow = (not nested and bool(value) and "base_vram_gb" not in value) or "up_to" in value or "contexts" in value
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=flow)


def _sequence(dumper: yaml.SafeDumper, value: list[Any] | tuple[Any, ...]) -> yaml.SequenceNode:
    """Figures of many layers on one line."""
    numbers = len(value) > 0 and all(isinstance(item, float | int) for item in value)
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
        text = _content(path)
    except NotFoundError as error:
        raise NotFoundError(f"no such calibration: {path}", code="no-such-file") from error
    return parse_calibration(text, str(path))


def parse_calibration(text: bytes, where: str) -> Calibration:
    """Read the text of an artifact; ``where`` names it in errors.

    Raises:
        BadInputError: damaged. ConfigError: a newer schema.
    """
    try:
        document = parse_yaml(text, where)
    except BadInputError as error:
        raise BadInputError(error.message, code="bad-artifact") from error
    calibration = from_document(document, where)
    _check_reserve(calibration, where)
    return calibration


def _check_reserve(calibration: Calibration, where: str) -> None:
    """What an engine keeps free follows from its version and variables: less would let a model fit that does not.

    An imported log says it by itself, and may be of a start with ``--fit-target``, which no variable records.

    Raises:
        BadInputError: the artifact says less.
    """
    metadata, recorded = calibration.metadata, calibration.metadata.placement.reserve_gb
    imported = metadata.machine.meter == "import"
    if recorded is None or imported or metadata.machine.target == "host" or not is_engine(calibration.engine):
        return
    policy = policy_of(calibration.engine)
    own = policy.reserve_bytes(metadata.engine.version, metadata.settings.env)
    if own is not None and from_gib(recorded) < own - MIB:
        raise BadInputError(
            f"{where} contradicts itself: reserve_gb is {recorded}, and {policy.title} keeps {format_size(own)} free",
            code="bad-artifact",
        )
