"""Imports point one way, and no room is crowded."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from harness.engines.registry import BUILT_IN, GROUP

ROOT = Path(__file__).parents[2] / "harness"
_BASE = {"units", "errors", "text", "files", "ownership"}
_PURE = {"model", "fit", "prediction"}
_MIDDLE = {"engines", "sandboxes", "meters", "logs"}
_UPPER = {
    *("options", "headers", "inventory", "store", "render", "exports", "report", "polling"),
    *_MIDDLE, *_PURE, *_BASE, "__version__",
}  # fmt: skip
#: What each room may import of ours, beside itself.
ALLOWED = {
    "units": set(),
    "errors": set(),
    "text": {"errors", "units"},
    "polling": set(),
    "files": set(),
    "ownership": set(),
    "model": _BASE,
    "fit": {"model", *_BASE},
    "prediction": {"fit", "model", *_BASE},
    "logs": {"model", *_BASE},
    "sandboxes": _BASE,
    "meters": {"model", *_BASE},
    "options": {"engines.registry", "model.record", *_BASE},
    "engines": {"options", "sandboxes.base", "logs", "polling", *_PURE, *_BASE},
    "store": {
        "options",
        "model",
        "engines.registry",
        "engines.settings",
        "sandboxes.container_config",
        *_BASE,
    },
    "render": {*_PURE, *_BASE},
    "exports": {*_PURE, *_BASE},
    "report": {"engines.registry", "store", "render", *_PURE, *_BASE},
    "inventory": {"options", "store", *_MIDDLE, *_PURE, *_BASE},
    "headers": {"polling", "store.catalog", "store.store", "engines.base", "engines.gguf", "engines.registry", "model", *_BASE},
    "measure": _UPPER,
    "serving": _UPPER,
    "maintain": {"measure", *_UPPER},
    "sweep": {"measure", *_UPPER},
    "api": {"measure", "serving", "maintain", "sweep", *_UPPER},
    "cli": {"options", "api", "engines.registry", "render", "exports", "store", "model", *_BASE, "__version__"},
    "pytest_plugin": {"", "serving.check", "render.verdict"},
}
#: Imports that do not follow the rule yet (importer, imported), and where they are to end. A row that nothing needs fails.
EXCEPTIONS = {
    ("cli", "inventory"): "api: a public function",
    ("cli", "fit"): "api: a public function",
    ("cli", "prediction"): "api: a public function",
    ("cli", "logs"): "api: a public function",
    ("cli", "measure"): "api: a public function",
    ("cli", "serving"): "api: a public function",
    ("cli", "maintain"): "api: a public function",
    ("cli", "sweep"): "api: a public function",
    ("cli", "report"): "api: a public function",
    ("render.capacity", "inventory.machine"): "model: the value that is shown, as data",
    ("render", "serving"): "model: the value that is shown, as data",
    ("render", "maintain"): "model: the value that is shown, as data",
    ("render", "sweep"): "model: the value that is shown, as data",
    ("render.loads", "logs"): "model: what a log does not say, as data",
    ("report.build", "maintain.diff"): "model: the value that is shown, as data",
    ("serving.child_process", "measure"): "measure: only what starts an engine; reading never imports it",
    ("serving.driver_overhead", "measure"): "measure: only what starts an engine; reading never imports it",
    ("serving.server", "measure"): "measure: only what starts an engine; reading never imports it",
}
#: The engines' own packages: everything else knows `engines.base` and the registry alone.
CONCRETE = ("engines.llama_server", "engines.ollama", "engines.vllm")
#: Third-party libraries that one room or file alone may use.
ALONE: dict[str, str | tuple[str, ...]] = {
    "docker": "sandboxes/docker",
    "pynvml": "meters/nvml",
    "click": "cli/",
    "pytest": "pytest_plugin",
}
#: Files outside `engines/` and `logs/` that still hold an engine's name, and why. A row that nothing needs fails.
NAMES = {
    "exports/formats.py": "names of formats, which are those of the programs that read them",
    "render/loads.py": "shows the section of a log that one engine alone has",
}
#: Files of an engine's package that are handed to the pure core.
PURE_ENGINE_FILES = ("policy.py", "scheduler.py", "settings.py", "starts.py")
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


def pure(path: Path) -> bool:
    if room(path) == "engines":
        return path.name in PURE_ENGINE_FILES
    return room(path) in ("options", "model", "fit", "prediction", "logs") or path == ROOT / "sweep" / "matrix.py"


def within(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def offences(path: Path) -> Iterator[tuple[str, str]]:
    """Imports of ours, by the importer and the imported module, that the rule does not allow."""
    where, importer = room(path), ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if where.startswith("__"):
        return
    for name in imports(path):
        if name.split(".")[0] != "harness":
            continue
        inside = name.removeprefix("harness").removeprefix(".")
        concrete = within(inside, CONCRETE) and where != "engines"
        if concrete or not within(inside, {where, *ALLOWED[where]}):
            yield importer, inside


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    for importer, inside in offences(path):
        known = any(within(importer, [one]) and within(inside, [other]) for one, other in EXCEPTIONS)
        assert known, f"{importer} imports {inside}"
    for name in imports(path):
        if (top := name.split(".")[0]) in ALONE:
            assert str(path.relative_to(ROOT)).startswith(ALONE[top]), f"{path} imports {name}"


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Importing such a package would put it in the function's place."""
    import harness

    assert not {room(path) for path in modules()} & set(harness.__all__)


def test_every_exception_is_still_needed() -> None:
    needed = [found for path in modules() for found in offences(path)]
    for one, other in EXCEPTIONS:
        assert any(within(importer, [one]) and within(inside, [other]) for importer, inside in needed), (one, other)


@pytest.mark.parametrize("path", [path for path in modules() if pure(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_data_rules_and_parsers_are_pure(path: Path) -> None:
    import sys

    impure = {"os", "io", "time", "pathlib", "subprocess", "socket", "threading", "datetime", "random", "shutil"}
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in impure, f"{path} imports {name}"
        assert top in PURE or top == "harness" or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_no_module_is_longer_than_it_can_be_read() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in modules() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def engine_names_in(path: Path) -> Iterator[str]:
    """Where a module tells engines apart: a constant that is an engine's name, a class of one, a test of its section."""
    tree = ast.parse(path.read_text())
    sections = {name.replace("-", "_") for name in BUILT_IN}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in BUILT_IN:
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Compare | ast.If | ast.IfExp | ast.BoolOp):
            sides = list(ast.iter_child_nodes(node))
            yield from (
                f"line {node.lineno}: .{one.attr}" for one in sides if isinstance(one, ast.Attribute) and one.attr in sections
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            names = [one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)]
            yield from (f"line {node.lineno}: {name}" for name in names if name in ("LlamaServer", "Ollama", "Vllm"))


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if room(path) not in ("engines", "logs", "model")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_engine_is_told_by_its_name(path: Path) -> None:
    found = list(engine_names_in(path))
    assert bool(found) == (str(path.relative_to(ROOT)) in NAMES), found


def test_pyproject_declares_the_engines_of_the_registry() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"][GROUP].items()) == list(BUILT_IN.items())
