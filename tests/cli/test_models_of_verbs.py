"""Every verb that takes a model takes it as ``list`` prints it, with a context behind it, and from any store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli.main import COMMANDS
from tests.support.calibrations import made_up, store_of, with_settings
from tests.support.command import Command

FREE = ("--available", "24GiB")
#: Verb -> its words around the model (MODEL stands for it), and whether a context says something to it.
VERBS: dict[str, tuple[tuple[str, ...], bool]] = {
    "check": (("MODEL", "--ctx", "4096", *FREE), True),
    "plan": (("MODEL", *FREE), True),
    "tune": (("MODEL", *FREE), True),
    "export": (("llama-server", "MODEL", *FREE), True),
    "predict": (("MODEL", "--ctx", "4096"), True),
    "serve": (("MODEL", "--ctx", "4096", *FREE, "--on-offload", "refuse", "--", "true"), True),
    "allocate": (("MODEL", "--ctx", "4096"), True),
    "show": (("MODEL",), False),
    "share": (("MODEL", "-o", "shared"), False),
    "recalibrate": (("MODEL", "--dry-run"), False),
    "diff": (("MODEL", "MODEL"), False),
    "rm": (("MODEL",), False),
    "rename": (("MODEL", "other-name"), False),
    "calibrate": (("MODEL", "--dry-run"), True),
    "bisect": (("MODEL", "--good", "1.0", "--bad", "1.1", "--versions", "1.0,1.1"), True),
    "estimate": (("MODEL",), True),
}
#: Verbs that take no model.
OTHERS = {
    "list", "parse", "import", "fit", "report", "merge", "sweep", "exporter", "mcp", "doctor", "completion", "help", "clean",
}  # fmt: skip
#: What a verb may end with where the model was found, but this machine or the made-up calibration lacks what it takes.
LACKING = {
    "serve": ("were not found where they were calibrated",),
    "share": ("the record of llama-server/plain",),
    "allocate": (
        "no calibration of plain by vLLM",
        "no calibration of plain@kv-q8 by vLLM",
        "is an id of llama-server, not of vllm",
    ),
    "calibrate": ("it is calibrated already; to measure it again: harness recalibrate llama-server/plain",),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    shelf = store_of(tmp_path / "store", made_up("plain"))
    shelf.write(shelf.path_of("llama-server", "plain", "kv-q8"), with_settings(made_up("plain"), kv_cache_type="q8_0"))
    return Command(tmp_path, monkeypatch, capfd)


def asked(verb: str, model: str) -> tuple[str, ...]:
    return verb, *(model if word == "MODEL" else word for word in VERBS[verb][0])


def test_no_verb_is_forgotten() -> None:
    assert set(VERBS) | OTHERS == set(COMMANDS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("bisect", "estimate")])
@pytest.mark.parametrize("model", ["plain", "llama-server/plain", "llama-server/plain@kv-q8", "plain@kv-q8", "plain@8,192"])
def test_a_model_is_taken_as_it_is_listed_and_with_a_context(run: Command, verb: str, model: str) -> None:
    if verb in ("rm", "rename") and model.endswith("8,192"):
        pytest.skip("files are not moved or removed at a context")
    done = run(*asked(verb, model))
    if verb in LACKING:
        assert any(text in done.stderr for text in LACKING[verb])
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", [verb for verb, (_, takes) in VERBS.items() if takes] + ["rm", "rename"])
def test_a_context_that_is_none_is_refused_as_such(run: Command, verb: str) -> None:
    done = run(*asked(verb, "plain@0"))
    assert done.returncode == 2
    assert "plain@0: a" in done.stderr, "a number of tokens is expected; or a calibration is of all contexts"


@pytest.mark.parametrize("verb", ["check", "predict", "tune"])
def test_a_context_behind_the_model_is_the_one_that_is_answered(run: Command, verb: str) -> None:
    data = json.loads(run(*asked(verb, "plain@8k"), "--json").stdout)["data"]
    found = data["models"][0] if verb == "check" else data
    assert found["context"] == 8192


@pytest.mark.parametrize("verb", ["show", "predict", "recalibrate", "diff", "rm", "rename", "plan", "check", "tune"])
def test_a_model_that_is_almost_written_is_named(run: Command, verb: str) -> None:
    done = run(*asked(verb, "plainn"))
    assert "did you mean llama-server/plain?" in done.stderr + done.stdout
