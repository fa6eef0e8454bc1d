"""``harness calibrate`` from its command line to its files, with an engine, a sandbox and a meter in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.units import MIB
from tests.support.command import Command, Done
from tests.support.fakes import World, open_doors
from tests.support.true_model import TrueModel


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(TrueModel(weights=400 * MIB, overhead=40 * MIB, kv_per_cell=12_288), target="gpu")
    open_doors(made, monkeypatch)
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def calibrate(run: Command, *options: str) -> Done:
    return run("calibrate", "made-up", "--engine", "llama-server", "--ctx", "1024,2048,4096", "--no-speed", *options)


def record_of(folder: Path) -> dict[str, object]:
    (path,) = (folder / "store" / "runs").glob("*/record.json")
    document: dict[str, object] = json.loads(path.read_text())
    return document


def test_the_one_document_names_both_files_and_holds_the_calibration(run: Command, world: World, tmp_path: Path) -> None:
    done = calibrate(run, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["exit_code"], document["status"]) == (0, 0, "ok")
    data = document["data"]
    assert {"artifact", "record", "calibration"} <= data.keys()
    assert Path(data["artifact"]).is_file()
    assert Path(data["record"]).is_file()
    assert data["calibration"]["metadata"]["quality"]["max_error"] == 0.0
    shown = run("show", "made-up", "--json")
    assert json.loads(shown.stdout)["data"]["calibration"] == data["calibration"]


def test_a_dry_run_starts_and_writes_nothing(run: Command, world: World, tmp_path: Path) -> None:
    done = calibrate(run, "--dry-run")
    assert done.returncode == 0
    assert "4,096" in done.stdout + done.stderr or "4096" in done.stdout + done.stderr
    assert world.events == []
    assert not (tmp_path / "store").exists()


def test_an_engine_that_dies_is_70_with_its_last_lines(run: Command, world: World, tmp_path: Path) -> None:
    def die() -> None:
        world.write("the last words\n")
        world.end(134)

    world.plots["load 2048"] = die
    done = calibrate(run, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["status"], document["errors"][0]["code"]) == (70, "error", "engine-ended")
    assert "the last words" in done.stderr
    assert record_of(tmp_path)["status"] == "partial"


def test_what_is_not_to_be_trusted_is_5_and_leaves_no_artifact(run: Command, world: World, tmp_path: Path) -> None:
    world.extra[2048] = 9 * MIB
    done = calibrate(run, "--json")
    assert (done.returncode, json.loads(done.stdout)["errors"][0]["code"]) == (5, "overhead-moves")
    assert record_of(tmp_path)["status"] == "complete"
    assert not list((tmp_path / "store").glob("*/*.yaml"))


def test_ctrl_c_is_130_and_the_partial_record_is_kept(run: Command, world: World, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    world.plots["read 1024"] = interrupt
    done = calibrate(run)
    assert done.returncode == 130
    assert record_of(tmp_path)["status"] == "partial"
    assert world.running is not None
    assert world.running.status is not None
