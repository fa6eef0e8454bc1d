"""What ``harness clean`` finds in the store, and what it leaves alone."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from harness.maintain.clean import Item, clean
from harness.ownership import MARK, start_time, this_process
from harness.sandboxes.reaper_main import FOLDERS, HOME_PREFIX, SECRETS_PREFIX
from harness.store.run_folder import RunFolder


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.setitem(FOLDERS, "home", ((str(tmp_path / "var-tmp"),), HOME_PREFIX))  # not what runs beside the tests


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that other tests put together are not looked at here."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, text: str = "") -> Path:
    """A file that is two days old: age is to prove nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for one in (path, path.parent):
        os.utime(one, (one.stat().st_atime, one.stat().st_mtime - 172_800))
    return path


def killed_run(folder: Path) -> Path:
    """The folder of a run whose process was killed."""
    run = RunFolder(folder)
    run.close()
    process = subprocess.Popen(["sleep", "600"])
    owner = msgspec.structs.replace(this_process(), pid=process.pid, start=start_time(process.pid) or "")
    process.kill()
    process.wait()
    (folder / MARK).write_bytes(msgspec.json.encode(owner))
    return write(folder / "engine-1.log")


def states(store: Path, *, yes: bool = False) -> dict[str, tuple[str, bool]]:
    def name(item: Item) -> str:
        return str(Path(item.name).relative_to(store))

    return {name(item): (item.state, item.removed) for item in clean(store, remove_abandoned=yes).items}


def test_what_a_killed_process_left_is_abandoned(tmp_path: Path) -> None:
    partial = write(tmp_path / "ollama" / ".m.yaml.harness-0123abcd.part")
    log = killed_run(tmp_path / "runs" / "a")
    expected = {"ollama/.m.yaml.harness-0123abcd.part": ("abandoned", False), "runs/a": ("abandoned", False)}
    assert states(tmp_path) == expected
    assert partial.exists()
    assert log.exists()
    assert {removed for _, removed in states(tmp_path, yes=True).values()} == {True}
    assert not partial.exists()
    assert not log.parent.exists()
    assert states(tmp_path) == {}


def test_what_is_held_is_in_use_however_old_it_is(tmp_path: Path) -> None:
    partial = write(tmp_path / "ollama" / ".m.yaml.harness-0123abcd.part")
    run = RunFolder(tmp_path / "runs" / "a")
    log = write(run.path / "engine-1.log")
    with partial.open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        assert {state for state, _ in states(tmp_path, yes=True).values()} == {"in-use"}
    run.close()  # a disk without locks: the process that is named in the mark still lives
    assert states(tmp_path)["runs/a"] == ("in-use", False)
    assert log.exists()


def test_folders_of_the_user_are_never_removed(tmp_path: Path) -> None:
    weights = write(tmp_path / "runs" / "detect" / "train1" / "best.pt")
    notes = write(tmp_path / "runs" / "notes" / "read-me.txt")
    within = write(killed_run(tmp_path / "runs" / "mixed").with_name("thesis.pdf"))
    elsewhere = write(tmp_path / "elsewhere" / "file")
    (killed_run(tmp_path / "runs" / "linked").with_name("engine-2.log")).symlink_to(elsewhere)
    found = states(tmp_path, yes=True)
    assert {state for state, _ in found.values()} == {"kept"}
    assert set(found) == {"runs/detect", "runs/notes", "runs/mixed", "runs/linked"}
    assert all(path.exists() for path in (weights, notes, within, elsewhere))


def test_a_store_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    log = killed_run(tmp_path / "theirs" / "a")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "runs").symlink_to(tmp_path / "theirs")
    assert states(tmp_path / "store", yes=True) == {}
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


def test_tokens_of_an_engine_whose_guard_was_killed_too_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FOLDERS, "secrets", ((str(tmp_path / "shm"),), SECRETS_PREFIX))
    gone = killed_run(tmp_path / "shm" / "harness-secrets-0").parent
    (gone / "hf_token").write_text("t0ken")
    theirs = killed_run(tmp_path / "shm" / "somebody-else").parent
    alive = RunFolder(tmp_path / "shm" / "harness-secrets-1")
    assert {name: state for name, (state, _) in states(tmp_path, yes=True).items()} == {
        "shm/harness-secrets-0": "abandoned",
        "shm/harness-secrets-1": "in-use",
    }
    assert not gone.exists()
    assert theirs.exists()
    alive.close()


def test_the_home_of_an_engine_whose_guard_was_killed_too_is_removed_and_the_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FOLDERS, "home", ((str(tmp_path / "tmp"),), HOME_PREFIX))
    weights = write(tmp_path / "models" / "weights")
    gone = killed_run(tmp_path / "tmp" / "harness-private-0").parent
    (gone / "models").symlink_to(tmp_path / "models")
    theirs = killed_run(tmp_path / "tmp" / "harness-other").parent
    alive = RunFolder(tmp_path / "tmp" / "harness-private-1")
    assert {name: state for name, (state, _) in states(tmp_path, yes=True).items()} == {
        "tmp/harness-private-0": "abandoned",
        "tmp/harness-private-1": "in-use",
    }
    assert (gone.exists(), theirs.exists(), weights.exists()) == (False, True, True)
    alive.close()
