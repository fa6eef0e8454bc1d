"""``harness export``: what fits, in a file; what does not, or is not known, ends as ``check`` does."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import yaml

from tests.support.calibrations import made_up, store_of, with_settings
from tests.support.command import Command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def test_models_that_were_named_fit_or_end_with_their_verdict(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up())

    assert "--ctx-size 8192 " in run("export", "llama-server", "made-up@8192", "--available", "24GiB").stdout
    assert "--ctx-size 58624 " in run("export", "llama-server", "made-up", "--available", "7GiB").stdout
    spills = run("export", "llama-server", "made-up@65536", "--available", "5GiB")
    assert (spills.returncode, spills.stdout) == (3, "")
    assert "hint: what would make it fit: harness tune made-up@65536" in spills.stderr
    assert run("export", "llama-server", "made-up", "unheard-of", "--available", "24GiB").returncode == 4
    assert run("export", "modelfile", "made-up", "--available", "24GiB").returncode == 2
    assert run("export", "nonsense", "made-up").returncode == 2


def test_without_models_everything_that_can_be_written_is(run: Command, tmp_path: Path) -> None:
    ollama = msgspec.structs.replace(made_up("other"), id="ollama/other", engine="ollama")
    store_of(tmp_path / "store", made_up(), made_up("second"), ollama)
    done = run("export", "llama-swap", "--available", "24GiB", "--json")

    answer = json.loads(done.stdout)["data"]
    assert [one["model"] for one in answer["models"]] == ["made-up", "second"]
    assert "ollama/other is left out" in done.stderr
    assert yaml.safe_load(answer["text"])["matrix"]["sets"] == {"fit0": "m0 & m1"}
    small = run("export", "llama-swap", "made-up@8192", "second@8192", "--available", "7GiB", "--json")
    sets = yaml.safe_load(json.loads(small.stdout)["data"]["text"])["matrix"]["sets"]
    assert sets == {"fit0": "m0", "fit1": "m1"}


def test_what_a_file_may_not_set_is_not_written(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", with_settings(made_up(), env={"LD_PRELOAD": "/tmp/x.so"}))
    refused = run("export", "llama-server", "made-up", "--available", "24GiB")
    assert (refused.returncode, refused.stdout) == (77, "")
    allowed = run("export", "llama-server", "made-up", "--available", "24GiB", "--allow-env", "LD_PRELOAD")
    assert "LD_PRELOAD=/tmp/x.so llama-server " in allowed.stdout


def test_it_is_written_to_a_file(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up())
    file = tmp_path / "swap.yaml"
    assert run("export", "llama-swap", "made-up", "--available", "24GiB", "-o", str(file)).returncode == 0
    assert list(yaml.safe_load(file.read_text())["models"]) == ["made-up"]
