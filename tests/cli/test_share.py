"""``harness share`` and ``harness merge --trust``, from a store to another machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.fit.constants import fit_record
from harness.store.store import Store
from tests.support.command import Command
from tests.unit.maintain.test_share import full_of_secrets


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def test_a_calibration_goes_from_one_machine_to_another(run: Command, tmp_path: Path) -> None:
    shelf = Store(tmp_path / "store")
    made = full_of_secrets()
    made = type(made)(**{name: getattr(made, name) for name in made.__struct_fields__} | {"run": "20261124T123456Z-run"})
    shelf.write_record(made)
    calibration = fit_record(made)
    shelf.write(shelf.path_of("llama-server", calibration.id.partition("/")[2]), calibration)
    folder = tmp_path / "community"
    done = run("share", calibration.id, "-o", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    (file,) = folder.rglob("*.json")
    assert "alice" not in file.read_text()

    assert "1 shared calibrations follow" in run("share", "--check", str(folder)).stdout
    there = ("--gpu-name", "NVIDIA Test A", "--store", str(tmp_path / "there"))
    assert "added: " in run("merge", str(folder), "--trust", "card", *there).stdout
    assert "there is one of your own" in run("merge", str(folder), "--trust", "card", *there).stdout
    file.write_text(file.read_text().replace("NVIDIA Test A", "NVIDIA Test B"))
    assert run("share", "--check", str(file)).returncode == 65
