"""Imports point one way, and no room is crowded."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from harness.engines.registry import BUILT_IN, GROUP

ROOT = Path(__file__).parents[2] / "harness"
_BASE = {"units", "errors", "text", "files", "ownership", "installation"}
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
    "installation": set(),
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
    "render": {"logs.hints", *_PURE, *_BASE},
    "exports": {*_PURE, *_BASE},
    "report": {"engines.registry", "store", "render", *_PURE, *_BASE},
    "inventory": {"options", "store", *_MIDDLE, *_PURE, *_BASE},
    "headers": {
        "polling",
        "store.catalog",
        "store.store",
        "engines.base",
        "engines.gguf",
        "engines.registry",
        "model",
        "logs",
        "sandboxes.environment",
        *_BASE,
    },
    "measure": _UPPER,
    "serving": _UPPER,
    # Only what starts an engine: what reads (check, plan, allocate) never imports the room that measures.
    "serving.server": {"measure", *_UPPER},
    "serving.child_process": {"measure", *_UPPER},
    "maintain": {"measure", "serving.driver_overhead", *_UPPER},
    "sweep": {"measure", *_UPPER},
    "api": {"measure", "serving", "maintain", "sweep", *_UPPER},
    # A verb is a few lines between click and a workflow's function. `api` is what other programs are promised; a verb also has
    # what nobody is promised (progress, journals, what would be done), so it calls the workflow itself.
    "cli": {
        "api",
        *("measure", "serving", "maintain", "sweep", "report", "logs", "prediction", "fit", "inventory"),
        *("options", "engines.registry", "render", "exports", "store", "model", "__version__"),
        *_BASE,
    },
    "pytest_plugin": {"", "serving.check", "render.verdict"},
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


def imports(path: Path, *, types: bool = True) -> Iterator[str]:
    """What a module imports; without ``types``, not what only a type checker does: such an import is no dependency."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for block in blocks for node in ast.walk(block)} if not types else set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
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
    allowed = {where, *ALLOWED.get(importer, ALLOWED[where])}
    for name in imports(path, types=False):
        if name.split(".")[0] != "harness":
            continue
        inside = name.removeprefix("harness").removeprefix(".")
        if (within(inside, CONCRETE) and where != "engines") or not within(inside, allowed):
            yield importer, inside


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    assert not [f"{importer} imports {inside}" for importer, inside in offences(path)]
    for name in imports(path):
        if (top := name.split(".")[0]) in ALONE:
            assert str(path.relative_to(ROOT)).startswith(ALONE[top]), f"{path} imports {name}"


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Importing such a package would put it in the function's place."""
    import harness

    assert not {room(path) for path in modules()} & set(harness.__all__)


def test_a_class_has_a_name_of_its_own() -> None:
    """One word for each thing: a reader who looks for a class finds one."""
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


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
