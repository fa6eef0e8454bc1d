"""``harness recalibrate`` over an upgrade, with an engine, a sandbox and a meter in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.units import MIB
from tests.support.command import Command
from tests.support.fakes import World, open_doors
from tests.support.true_model import TrueModel

#: The batch by context of Ollama from 0.30 on.
RULE = ((4096, 512), (32_768, 1024), (1 << 30, 2048))
MODEL = TrueModel(weights=400 * MIB, overhead=40 * MIB, kv_per_cell=12_288)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(MODEL, engine="ollama", persistent=True, target="gpu", version="0.24.0")
    open_doors(made, monkeypatch)
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def document(done: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def calibrate(run: Command, *options: str) -> dict[str, Any]:
    done = run("calibrate", "made-up", "--engine", "ollama", "--ctx", "4096,8192,16384", *options, "--json")
    assert done.returncode == 0, done.stdout
    calibration: dict[str, Any] = document(done)["data"]["calibration"]
    return calibration


def artifact(folder: Path) -> Path:
    (path,) = (folder / "store" / "ollama").glob("*.yaml")
    return path


def test_an_upgrade_that_chooses_the_batch_by_context_keeps_the_range(run: Command, world: World, tmp_path: Path) -> None:
    before = calibrate(run, "--no-speed")
    assert before["metadata"]["quality"]["valid_to"] == 131_072
    world.version, world.limits = "0.33.0", RULE
    done = run("recalibrate", "made-up", "--json")
    (one,) = document(done)["data"]["calibrations"]
    assert (done.returncode, one["status"]) == (0, "done"), done.stdout
    after = document(run("show", "made-up", "--json"))["data"]["calibration"]["metadata"]
    assert after["quality"]["valid_to"] == 131_072
    assert [(band["up_to"], band["num_batch"]) for band in after["bands"]] == [(4096, 512), (32_768, 1024), (131_072, 2048)]
    again = document(run("recalibrate", "--stale", "--dry-run", "--json"))["data"]["calibrations"][0]
    assert (again["stale"], again["reasons"]) == (False, [])


def test_one_that_loses_range_is_no_success_and_replaces_nothing(run: Command, world: World, tmp_path: Path) -> None:
    calibrate(run, "--no-speed")
    kept = artifact(tmp_path).read_text()
    world.version, world.capacity = "0.33.0", MODEL.truth(8192, 512) + MIB
    done = run("recalibrate", "made-up", "--json")
    found = document(done)
    (one,) = found["data"]["calibrations"]
    assert (done.returncode, one["status"], found["errors"][0]["code"]) == (5, "narrower", "lost-range")
    assert artifact(tmp_path).read_text() == kept
    assert Path(one["record"]).is_file()
    assert next(effect["text"] for effect in one["drift"]["effects"]) == "calibrated range: to 131,072 → 8,192 tokens"
    shown = run("recalibrate", "made-up")
    text = " ".join((shown.stdout + shown.stderr).split())
    assert "valid to 8,192 tokens, before to 131,072" in text
    assert "a load at 16,384 tokens did not fit here" in text
    assert run("recalibrate", "made-up", "--force", "--json").returncode == 0
    assert artifact(tmp_path).read_text() != kept


def test_speeds_stay_where_only_memory_is_measured_again(run: Command, world: World, tmp_path: Path) -> None:
    first = calibrate(run)
    assert first["metadata"]["performance"]["decode_tokens_per_s"] == 60.0
    for _ in range(2):
        again = calibrate(run, "--no-speed")["metadata"]
        assert again["performance"] == first["metadata"]["performance"]
        said = [note for note in again["quality"]["notes"] if note.startswith("speed")]
        assert said == [f"speeds are those of run {first['metadata']['run']}: weights, engine and settings are the same"]
    world.version = "0.33.0"
    assert calibrate(run, "--no-speed")["metadata"]["performance"]["decode_tokens_per_s"] is None
