"""A hint never names what the next command refuses: every hint about engines and sandboxes is followed, as a user would."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness.engines.ollama import native
from harness.errors import UnavailableError
from harness.inventory import backend
from harness.meters import drm_devices
from harness.model.gpu import LocalGpu
from tests.support.command import Command
from tests.support.gguf_file import write_gguf
from tests.support.ollama_installed import program, store

ROOT = Path(__file__).parents[2] / "harness"
#: Options that a hint may tell to use, with what a user would put for a placeholder.
OPTION = re.compile(r"--(engine-binary|engine|sandbox|gpus|models|image)(?: (?!-)([^\s,;:)]+))?")
#: Options one after the other are typed together.
TOGETHER = re.compile(rf"(?:{OPTION.pattern.replace('(engine', '(?:engine').replace('([^', '(?:[^')} ?)+")
#: What a hint tells to do outside harness: following it is not for a test.
ELSEWHERE = (
    "start Docker",
    "install",
    "ollama pull",
    "run harness as root",
    "works here:",
    "the path of a .gguf file",
    "give a name",
)


class Machine(NamedTuple):
    """What a machine has."""

    docker: bool
    gpu: bool
    ollama: bool
    embedded: bool


MACHINES = [Machine(*has) for has in itertools.product((True, False), repeat=4)]
ENGINES, SANDBOXES, GPUS = ("auto", "ollama", "llama-server", "vllm"), ("auto", "docker", "process"), ("all", "none")
Set = Callable[[Machine], Path]


def named(machine: Machine) -> str:
    return "+".join(name for name, there in machine._asdict().items() if there) or "bare"


@pytest.fixture
def become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Set:
    """Make this machine look like another; the folder with its files."""

    def set_up(machine: Machine) -> Path:
        obstacle = None if machine.docker else "no Docker daemon answers"
        monkeypatch.setattr(backend, "docker_obstacle", lambda: obstacle)
        monkeypatch.setattr(backend, "docker_gpu_obstacle", lambda: obstacle if machine.gpu else "there is no NVIDIA GPU")
        monkeypatch.setattr(drm_devices, "drm_gpus", list)

        def nvidia(*_: object) -> tuple[tuple[LocalGpu, ...], str, str]:
            if not machine.gpu:
                raise UnavailableError("no NVIDIA driver found", code="no-nvml")
            return (LocalGpu(key="0", name="NVIDIA Test A", uuid="GPU-1"),), "nvml", "measured by NVML"

        monkeypatch.setattr(backend, "nvidia_gpus", nvidia)
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir()
        server = tmp_path / "llama-server"
        server.write_text('#!/bin/sh\necho "version: 1 (made-up)" >&2\n')
        server.chmod(0o755)
        embedded = (str(server),) if machine.embedded else None
        monkeypatch.setattr("harness.engines.llama_server.recipe.embedded_command", lambda: embedded)
        monkeypatch.setattr("harness.engines.llama_server.recipe.missing_instructions", lambda _: ())
        monkeypatch.setattr(native, "_SERVICE_STORES", ())
        monkeypatch.setattr(native, "_UNITS", ())
        monkeypatch.setattr(native, "processes", lambda _: ())
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
        monkeypatch.delenv("OLLAMA_MODELS", raising=False)
        if machine.ollama:
            program(bin_folder, Path("/engine"))
            store(tmp_path / "home" / ".ollama" / "models")
        store(tmp_path / "lent")
        write_gguf(tmp_path / "m.gguf")
        return tmp_path

    return set_up


def refused(command: Command, arguments: dict[str, str]) -> tuple[int, str, str | None]:
    """Status, message and hint of a dry run."""
    words = [word for pair in arguments.items() if pair[0] != "model" for word in pair]
    done = command("calibrate", arguments["model"], *words, "--dry-run", "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    if document["exit_code"] == 0:
        return 0, "", None
    (error,) = document["errors"]
    return document["exit_code"], error["message"], error["hint"]


def told(hint: str, folder: Path, engine: str) -> list[dict[str, str]]:
    """The changes of a command line that a hint names; for a placeholder, or without a value, what a user would put there."""
    own = folder / ("bin/ollama" if engine == "ollama" else "llama-server")
    put = {"models": str(folder / "lent"), "engine-binary": str(own), "image": "ollama/ollama:1"}
    found = []
    for group in TOGETHER.findall(hint):
        change = {f"--{option}": value if value.islower() else put[option] for option, value in OPTION.findall(group)}
        if Path(change.get("--engine-binary", "/")).exists():
            found.append(change)
    return found


@pytest.mark.parametrize(
    "machine", MACHINES, ids=lambda machine: "+".join(k for k, v in machine._asdict().items() if v) or "bare"
)
def test_whatever_a_hint_names_is_not_refused_next(
    machine: Machine, become: Set, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = become(machine)
    command = Command(folder, monkeypatch, capfd)
    for engine, sandbox, gpus, model in itertools.product(ENGINES, SANDBOXES, GPUS, ("tiny", "m.gguf")):
        start = {"model": model, "--engine": engine, "--sandbox": sandbox, "--gpus": gpus}
        status, message, hint = refused(command, start)
        if status == 0:
            continue
        assert hint, f"{start}: {message}"
        changes = told(hint, folder, engine)
        assert changes or any(word in hint for word in ELSEWHERE), f"{start}: the hint {hint!r} names nothing to do"
        for change in changes:
            status, after, _ = refused(command, start | change)
            assert status == 0, f"{start}: {message} ({hint}) -> {change}: {after}"


def test_a_sandbox_names_no_other_sandbox() -> None:
    """It does not know the engine, so it cannot know what else that engine runs in."""
    for path in (ROOT / "sandboxes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                assert "--sandbox" not in ast.unparse(node.value), path


@pytest.mark.parametrize(
    "machine", MACHINES, ids=lambda machine: "+".join(k for k, v in machine._asdict().items() if v) or "bare"
)
@pytest.mark.parametrize("engine", ["ollama", "llama-server"])
def test_without_docker_a_process_is_named_where_there_is_a_program(machine: Machine, engine: str, become: Set) -> None:
    from harness.engines.base import Options
    from harness.engines.registry import recipe_of

    become(machine)
    hint = backend.elsewhere(recipe_of(engine), Options(), "start Docker") or ""
    assert ("--sandbox process" in hint) is (machine.ollama if engine == "ollama" else machine.embedded)


def test_options_of_a_hint_are_typed_as_they_stand(tmp_path: Path) -> None:
    assert told("works here: a. by Ollama: --engine ollama --sandbox docker --gpus none", tmp_path, "auto") == [
        {"--engine": "ollama", "--sandbox": "docker", "--gpus": "none"}
    ]
    assert told("start Docker, or --sandbox process; --models DIR", tmp_path, "ollama") == [
        {"--sandbox": "process"},
        {"--models": str(tmp_path / "lent")},
    ]


#: What a name, an attribute or a function is called that holds a hint.
_ADVISES = re.compile(r"(?:^|[._])(?:hint|advice|elsewhere|calibrating|works?_here)s?$", re.IGNORECASE)


def hints() -> list[tuple[str, str]]:
    """Every text that becomes a hint, with its file: of a keyword, a name or a function that is called so."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            values: list[ast.AST] = []
            if isinstance(node, ast.keyword) and node.arg in ("hint", "advice", "next"):
                values = [node.value]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(_ADVISES.search(ast.unparse(target)) for target in targets):
                    values = [node.value]
            elif isinstance(node, ast.FunctionDef) and _ADVISES.search(node.name):
                values = [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None]
            for value in values:
                parts = [one.value for one in ast.walk(value) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                found.append((path.name, " ".join(parts)))
    return [one for one in found if one[1]]


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Every command of ours that any text of the program names, as words; what is put in is a word, too."""
    from harness.cli.main import COMMANDS

    found = []
    for path in sorted(ROOT.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if id(node) in parts:
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(one.value if isinstance(one, ast.Constant) else "PUT_IN" for one in node.values)  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            for verb, rest in re.findall(r"(?<![\w./-])harness ([a-z]+)((?: [^\s,;:)`]+)*)", text):
                words: list[str] = []
                for word in rest.split():
                    value = bool(words) and words[-1].startswith("--")  # of the option before it
                    if not value and not re.fullmatch(r"--?[a-z][a-z-]*|[A-Z_@\d.]+(?:\.yaml)?", word):
                        break
                    words.append(word.rstrip("."))
                if verb in COMMANDS:
                    found.append((path.name, (verb, *words)))
    return list(dict.fromkeys(found))


def test_every_command_that_the_program_names_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --help behind it, everything before is parsed and nothing is done."""
    command, named = Command(tmp_path, monkeypatch, capfd), commands()
    assert len(named) > 30
    refused = {}
    for file, words in named:
        done = command(*words, "--help")
        open_option = f"error: Invalid value for '{words[-1]}'"  # the text ends before the option's value, which code puts in
        if done.returncode and not done.stderr.startswith(open_option):
            refused[file, words] = done.stderr
    assert refused == {}


def test_every_verb_and_option_that_a_hint_names_exists() -> None:
    from harness.cli.main import cli

    verbs = {name: cli.get_command(None, name) for name in cli.list_commands(None)}  # type: ignore[arg-type]
    options = {flag for command in verbs.values() if command for param in command.params for flag in param.opts}
    named = hints()
    assert len(named) > 200
    for file, text in named:
        for verb in re.findall(r"(?<!run )(?<!start )\bharness ([a-z]+)\b", text):
            assert verb in {*verbs, "runs"}, f"{file}: {text}"
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert flag in options | {"--runtime", "--help"}, f"{file}: {text}"
