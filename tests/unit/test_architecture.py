"""Imports point one way, and no room is crowded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "harness"
#: What each room may import of ours.
ALLOWED = {
    "units": set(),
    "errors": set(),
    "core": {"core", "units", "errors"},
    "logs": {"logs", "core", "units", "errors"},
    "sandboxes": {"sandboxes", "core", "logs", "units", "errors"},
    "meters": {"meters", "core", "logs", "units", "errors"},
    "engines": {"engines", "sandboxes.base", "core", "logs", "units", "errors"},
    "store": {"core", "units", "errors"},
    "catalog": {"core", "units", "errors"},
    "config": {"errors"},
    "report": {"report", "core", "logs", "units", "errors"},
    "workflows": {
        *("workflows", "engines", "sandboxes", "meters", "store", "catalog", "config", "report"),
        *("logs", "core", "units", "errors", "__version__"),
    },
    "lifecycle": {
        *("workflows", "engines", "sandboxes", "meters", "store", "catalog", "config"),
        *("logs", "core", "units", "errors", "__version__"),
    },
    "api": {"lifecycle", "workflows", "store", "logs", "core", "units", "errors"},
    "pytest_plugin": {"", "workflows.guard", "workflows.sentences"},
}
#: Third-party libraries that one room or file alone may use.
ALONE = {"docker": "sandboxes/docker", "pynvml": "meters/nvml", "click": "cli/", "pytest": "pytest_plugin"}
#: Libraries that a pure room may use.
PURE = {"msgspec"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "harness":
                yield from (f"harness.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    where = room(path)
    allowed = ALLOWED.get(where)
    for name in imports(path):
        top = name.split(".")[0]
        if top == "harness" and allowed is not None:
            inside = name.removeprefix("harness").removeprefix(".")
            assert any(inside == one or inside.startswith(f"{one}.") for one in allowed), f"{path} imports {name}"
        if top in ALONE:
            assert str(path.relative_to(ROOT)).startswith(ALONE[top]), f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", [path for path in modules() if room(path) in ("core", "logs")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_core_and_the_parsers_are_pure(path: Path) -> None:
    import sys

    impure = {"os", "io", "time", "pathlib", "subprocess", "socket", "threading", "datetime", "random", "shutil"}
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in impure, f"{path} imports {name}"
        assert top in PURE or top == "harness" or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_no_module_is_longer_than_it_can_be_read() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in modules() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
