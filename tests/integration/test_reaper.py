"""The reaper where the contract of sandboxes does not look: refusals, its own death, its cost."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import (
    BadInputError,
    BusyError,
    CannotWriteError,
    EngineError,
    HarnessError,
    NotFoundError,
    NotPermittedError,
)
from harness.sandboxes.reaper import Reaper
from harness.sandboxes.reaper_main import descendants
from harness.store.run_folder import life_of
from tests.support.places import PROGRAM, ProcessPlace
from tests.support.victim import Victim
from tests.support.waiting import alive, until


@pytest.fixture
def reaper() -> Iterator[Reaper]:
    with Reaper() as started:
        yield started


def spawn(reaper: Reaper, folder: Path, *scenario: str) -> int:
    return reaper.spawn((sys.executable, str(PROGRAM), *scenario), env={}, cwd=folder, log=folder / "log")


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("missing", NotFoundError),
        ("no-interpreter", NotFoundError),
        ("plain-file", NotPermittedError),
        ("not-a-program", EngineError),
        ("nul\0name", BadInputError),
    ],
)
def test_a_program_that_cannot_run_says_why(reaper: Reaper, tmp_path: Path, program: str, kind: type[HarnessError]) -> None:
    """Each reason has its own error, and the reaper can start something else afterwards."""
    executable(tmp_path / "no-interpreter", "#!/nowhere/python\n")
    (tmp_path / "plain-file").write_text("#!/bin/sh\n")
    executable(tmp_path / "not-a-program", "no magic number\n")

    with pytest.raises(kind):
        reaper.spawn((f"{tmp_path}/{program}",), env={}, cwd=tmp_path, log=tmp_path / "log")

    assert reaper.wait(spawn(reaper, tmp_path, "leave", "0"), 200) == 0


def test_a_log_that_cannot_be_written(reaper: Reaper, tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError):
        reaper.spawn((sys.executable,), env={}, cwd=tmp_path, log=tmp_path)


def test_one_engine_at_a_time(reaper: Reaper, tmp_path: Path) -> None:
    spawn(reaper, tmp_path, "sleep")

    with pytest.raises(BusyError):
        spawn(reaper, tmp_path, "sleep")


def test_names_that_are_no_text(reaper: Reaper, tmp_path: Path) -> None:
    """Arguments, variables and paths of arbitrary bytes reach the engine unchanged."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9\n")
    folder.mkdir()
    odd = os.fsdecode(b"\xff\xc3\xa9")
    code = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]) + os.environb[b'ODD'] + os.getcwdb())"

    pid = reaper.spawn((sys.executable, "-c", code, odd), env={"ODD": odd}, cwd=folder, log=folder / odd)

    assert reaper.wait(pid, 200) == 0
    assert (folder / odd).read_bytes() == b"\xff\xc3\xa9" * 2 + os.fsencode(folder)


def test_children_that_outlive_the_engine_are_ended(reaper: Reaper, tmp_path: Path) -> None:
    """When the engine's first process crashes, what it started does not stay."""
    code = "import os, subprocess, sys\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\nos._exit(9)"

    pid = reaper.spawn((sys.executable, "-c", code), env={"PATH": os.defpath}, cwd=tmp_path, log=tmp_path / "log")

    assert reaper.wait(pid, 200) == 9
    assert reaper.pid is not None
    assert descendants(reaper.pid) == set()


def test_losing_the_reaper_ends_the_engine_and_voids_the_run(reaper: Reaper, tmp_path: Path) -> None:
    """When the reaper itself is killed, harness notices, ends the whole family, and says so."""
    pid = spawn(reaper, tmp_path, "family")
    log = tmp_path / "log"
    until(lambda: b"grandchild up" in log.read_bytes() and b"detached up" in log.read_bytes(), "the family")
    family = reaper.pids()
    assert len(family) == 4
    assert reaper.pid is not None

    os.kill(reaper.pid, signal.SIGKILL)

    until(lambda: not any(alive(one) for one in family), "the end of the family")
    with pytest.raises(EngineError) as caught:
        reaper.wait(pid, 200)
    assert caught.value.code == "supervision-lost"
    reaper.end(pid)  # nothing is left to end, and that is no error


def test_a_reaper_told_to_end_takes_the_engine_along(reaper: Reaper, tmp_path: Path) -> None:
    """SIGTERM (a machine that shuts down) ends the engine first, politely."""
    pid = spawn(reaper, tmp_path, "stubborn")
    assert reaper.pid is not None

    os.kill(reaper.pid, signal.SIGTERM)

    until(lambda: not alive(pid), "the end of the engine")


def test_a_forked_child_of_harness_does_not_keep_the_engine(tmp_path: Path) -> None:
    """The owner's death counts even where a forked child still holds the other end of the link."""
    seen, tell = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            reaper = Reaper()
            reaper.start()
            engine = spawn(reaper, tmp_path, "sleep")
            holder = os.fork()
            if holder == 0:
                signal.pause()
            os.write(tell, f"{engine} {holder}".encode())
        finally:
            os._exit(0)  # a child that fails is no second run of the tests
    os.close(tell)
    engine, holder = map(int, os.read(seen, 100).split())
    os.waitpid(owner, 0)
    os.close(seen)
    try:
        until(lambda: not alive(engine), "the end of the engine")
    finally:
        os.kill(holder, signal.SIGKILL)


def test_the_reaper_is_small(reaper: Reaper) -> None:
    """It lives beside every measurement: a quarter of the memory that a bare psutil import would take."""
    status = Path(f"/proc/{reaper.pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0])

    assert resident < 24 << 10, "KiB"


def test_closing_twice_and_starting_again(tmp_path: Path) -> None:
    reaper = Reaper()
    reaper.start()
    first = spawn(reaper, tmp_path, "sleep")
    reaper.close()
    reaper.close()
    assert not alive(first)

    reaper.start()

    assert reaper.wait(spawn(reaper, tmp_path, "leave", "4"), 200) == 4
    reaper.close()


def test_the_end_of_the_link_alone_is_the_order_to_end(reaper: Reaper, tmp_path: Path) -> None:
    """Harness may be alive and yet have let go: the engine goes too, although no process has ended."""
    pid = spawn(reaper, tmp_path, "sleep")
    assert reaper._link is not None

    reaper._link.shutdown(socket.SHUT_WR)

    until(lambda: not alive(pid), "the end of the engine")


def test_a_kill_of_harness_s_whole_process_group_does_not_reach_the_reaper(tmp_path: Path) -> None:
    """As supervisors do it: with -9, all at once. The reaper lives on in a session of its own, and ends the family."""
    place = ProcessPlace(tmp_path)
    with Victim("process", tmp_path, mark=place.mark) as victim:
        pids = victim.wait_for_family()

        os.killpg(victim.pid, signal.SIGKILL)

        until(lambda: not any(alive(pid) for pid in pids), "the end of the family")
        until(lambda: not place.leftovers(), "nothing left")


def secrets_folder(reaper: Reaper, folder: Path) -> Path:
    """The folder of a token that a sleeping engine has."""
    env = {"TOKEN": "/run/secrets/token"}
    reaper.spawn(
        (sys.executable, str(PROGRAM), "secret", "token"), env=env, cwd=folder, log=folder / "log", secrets={"token": "t0ken"}
    )
    until(lambda: (folder / "log").read_text().endswith("\n"), "the secret")
    return Path(json.loads((folder / "log").read_text())["path"]).parent


def test_a_token_goes_with_its_engine_and_bears_our_mark(reaper: Reaper, tmp_path: Path) -> None:
    folder = secrets_folder(reaper, tmp_path)
    assert life_of(folder) == "alive"
    assert folder.stat().st_mode & 0o777 == 0o700
    reaper.close()
    assert not folder.exists()


def test_a_token_does_not_outlive_a_killed_reaper(reaper: Reaper, tmp_path: Path) -> None:
    folder = secrets_folder(reaper, tmp_path)
    assert reaper.pid is not None
    os.kill(reaper.pid, signal.SIGKILL)
    until(lambda: not folder.exists(), "the end of the token")


def test_a_token_does_not_outlive_a_killed_harness(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = os.fork()
    if child == 0:
        try:
            owner = Reaper()
            owner.start()
            secrets_folder(owner, tmp_path)
            (tmp_path / "up").touch()
            signal.pause()
        finally:
            os._exit(0)
    until((tmp_path / "up").exists, "the engine")
    folder = Path(json.loads(log.read_text())["path"]).parent
    assert folder.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not folder.exists(), "the end of the token")


def test_an_engine_log_is_for_its_owner_alone(reaper: Reaper, tmp_path: Path) -> None:
    spawn(reaper, tmp_path, "sleep")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
