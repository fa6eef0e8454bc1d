"""What ``harness clean`` finds in the store, and what it leaves alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.maintain.clean import Item, clean

OLD = 10_000.0


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")


def write(path: Path, text: str = "", *, old: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if old:
        for one in (path, path.parent):
            os.utime(one, (one.stat().st_atime, one.stat().st_mtime - OLD))
    return path


def states(store: Path, *, yes: bool = False) -> dict[str, tuple[str, bool]]:
    def name(item: Item) -> str:
        return str(Path(item.name).relative_to(store))

    return {name(item): (item.state, item.removed) for item in clean(store, remove_abandoned=yes).items}


def test_half_written_files_and_empty_runs_are_abandoned_after_an_hour(tmp_path: Path) -> None:
    partial = write(tmp_path / "ollama" / ".m.yaml.0123abcd.part")
    log = write(tmp_path / "runs" / "a" / "engine-0.log")
    expected = {"ollama/.m.yaml.0123abcd.part": ("abandoned", False), "runs/a": ("abandoned", False)}
    assert states(tmp_path) == expected
    assert partial.exists()
    assert log.exists()
    assert {removed for _, removed in states(tmp_path, yes=True).values()} == {True}
    assert not partial.exists()
    assert not log.parent.exists()
    assert states(tmp_path) == {}


def test_what_is_being_written_is_in_use(tmp_path: Path) -> None:
    partial = write(tmp_path / "ollama" / ".m.yaml.0123abcd.part", old=False)
    log = write(tmp_path / "runs" / "a" / "engine-0.log", old=False)
    assert {state for state, _ in states(tmp_path, yes=True).values()} == {"in-use"}
    assert partial.exists()
    assert log.exists()


def test_measurements_and_files_of_others_are_never_removed(tmp_path: Path) -> None:
    kept = [
        write(tmp_path / "ollama" / "m.yaml"),
        write(tmp_path / "ollama" / ".notes.part"),
        write(tmp_path / "runs" / "whole" / "record.json", json.dumps({"status": "complete"})),
        write(tmp_path / "runs" / "cut" / "record.json", json.dumps({"status": "partial"})),
        write(tmp_path / "runs" / "damaged" / "record.json", "{"),
        write(tmp_path / "elsewhere" / "file"),
    ]
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    assert states(tmp_path, yes=True) == {"runs/cut": ("kept", False), "runs/damaged": ("kept", False)}
    assert all(path.exists() for path in kept)


def test_without_a_daemon_the_store_is_still_looked_at_and_that_is_said(tmp_path: Path) -> None:
    survey = clean(tmp_path / "none", remove_abandoned=True)
    assert survey.items == ()
    assert "no Docker daemon answers" in str(survey.docker)
