"""Acts out what somebody hostile, or Murphy, would do to harness; each attempt is held or breaks it.

    python -m bench.red_team

Needs Docker on this machine, which itself is never touched: a frozen daemon and one that drips stand behind sockets of ours.
Nothing is written outside a temporary folder. The exit status is the number of attempts that went through.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from harness.errors import EngineError
from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.record import EngineVersion, Settings
from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.leftovers import leftovers, remove, sweep
from harness.sandboxes.reaper_main import SECRET_PLACES, SECRETS_PREFIX
from harness.store.store import Store
from tests.support.background import background, environment
from tests.support.places import DockerPlace
from tests.support.records import load, record
from tests.support.slow_daemon import SlowDaemon
from tests.support.waiting import until

#: How long a command may take that finds no daemon it can use, and one that was told to end, seconds.
NO_DAEMON: Final = 15.0
TOLD: Final = 5.0
MODEL: Final = "llama-server/made-up"
#: Variables and what would happen if an engine were started with them.
HOSTILE: Final = {
    "LD_PRELOAD": "{here}/evil.so", "LLAMA_ARG_LOG_FILE": "{here}/victim", "LLAMA_ARG_RPC": "10.0.0.1:1",
    "VLLM_ARGS": "--trust-remote-code", "HTTPS_PROXY": "http://10.0.0.1", "PATH": "{here}",
}  # fmt: skip


def harness(here: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command, to its end."""
    argv = [sys.executable, "-m", "harness", *words]
    return subprocess.run(
        argv, cwd=here, env=environment(here, **env), capture_output=True, text=True, check=False, timeout=120
    )


def calibration(**changes: object) -> Calibration:
    """One of somebody else's."""
    base = fit_record(record(load(8192), load(16384), load(32768)))
    return msgspec.structs.replace(base, metadata=msgspec.structs.replace(base.metadata, **changes))


def shared_file_runs_nothing(here: Path) -> bool:
    """LD_PRELOAD and its kin in a calibration: merge does not take it, serve and recalibrate do not start."""
    victim = here / "victim"
    victim.write_text("mine")
    held = []
    for name, value in HOSTILE.items():
        theirs = Store(here / f"theirs-{name}")
        settings = Settings(env={name: value.format(here=here)})
        theirs.write(theirs.path_of("llama-server", "made-up"), calibration(settings=settings, run=None))
        merged = harness(here, "merge", str(theirs.root))
        served = harness(here, "serve", MODEL, "--ctx", "8192", "--available", "24g", "--store", str(theirs.root), "--", "true")
        again = harness(here, "recalibrate", "made-up", "--store", str(theirs.root))
        shown = all(name in done.stdout + done.stderr for done in (merged, served, again))
        held.append(shown and 77 == merged.returncode == served.returncode == again.returncode)
    return all(held) and victim.read_text() == "mine"


def shared_image_is_not_started(here: Path) -> bool:
    """An image of somebody's in a calibration."""
    theirs = Store(here / "image")
    machine = msgspec.structs.replace(calibration().metadata.machine, sandbox="docker")
    engine = EngineVersion(version="1", image="evil/server:1", image_digest=f"sha256:{'0' * 64}")
    theirs.write(theirs.path_of("llama-server", "made-up"), calibration(machine=machine, engine=engine, run=None))
    done = harness(here, "serve", MODEL, "--ctx", "8192", "--available", "24g", "--store", str(theirs.root), "--", "true")
    return done.returncode == 77 and "--allow-image" in done.stderr


def folders_of_the_user_stay(here: Path) -> bool:
    """``clean --yes`` over a folder of training runs, two days old."""
    best = here / "store" / "runs" / "detect" / "train1" / "best.pt"
    best.parent.mkdir(parents=True)
    best.write_bytes(b"weights")
    for path in (best, best.parent, best.parent.parent):
        os.utime(path, (0, 0))
    harness(here, "clean", "--yes")
    return best.exists()


def links_are_not_followed(here: Path) -> bool:
    """A log of a run that is a link to a file of root's."""
    theirs = Store(here / "linked")
    theirs.write_record(record(load(8192), load(16384), load(32768)))
    (run,) = theirs.runs()
    (run / "engine-1.log").symlink_to("/etc/shadow")
    harness(here, "merge", str(theirs.root), "--store", str(here / "mine"))
    return not list((here / "mine").rglob("engine-1.log"))


def slow_daemons_hold_nobody(here: Path) -> bool:
    """A frozen daemon and one that drips: commands end in time, and at once where a signal says so."""
    held = []
    kinds: tuple[tuple[str, tuple[str, ...]], ...] = (("frozen", ("clean",)), ("frozen", ("recalibrate", "--dry-run")))
    for kind, words in kinds:
        with slow(here, kind) as daemon:
            begin = time.monotonic()
            done = harness(here, *words, DOCKER_HOST=daemon.address)
            held.append(done.returncode == 0 and time.monotonic() - begin < NO_DAEMON)
    for kind in ("frozen", "dripping"):
        for number, status in ((signal.SIGINT, 130), (signal.SIGHUP, 143)):
            with slow(here, kind) as daemon, background(here) as start:
                process = start("clean", DOCKER_HOST=daemon.address)
                until(daemon.asked.is_set, "a question to the daemon")
                begin = time.monotonic()
                process.send_signal(number)
                process.wait(60)
                held.append(process.returncode == status and time.monotonic() - begin < TOLD)
    return all(held)


@contextlib.contextmanager
def slow(here: Path, kind: str) -> Iterator[SlowDaemon]:
    """A slow daemon in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=here) as folder, SlowDaemon(Path(folder), kind) as daemon:  # type: ignore[arg-type]
        yield daemon


def a_living_owner_is_believed(here: Path) -> bool:
    """Our own container, by a sweep in a world whose clock is 25 hours ahead."""
    with DockerPlace(here).opened() as place:
        running = place.start("sleep")
        ahead = ["unshare", "--time", "--fork", "--boottime", "90000", sys.executable, "-m", "harness", "clean", "--yes"]
        subprocess.run(ahead, cwd=here, env=environment(here), check=False, capture_output=True, timeout=120)
        with Daemon() as daemon:
            sweep(daemon)
        return running.exit_status() is None


def a_killed_guard_is_noticed(here: Path) -> bool:
    """The reaper, killed beside a container."""
    with DockerPlace(here).opened() as place:
        running = place.start("sleep")
        os.kill(int(place.reaper.pid or 0), signal.SIGKILL)

        def noticed() -> bool:
            try:
                return running.exit_status() is not None
            except EngineError as error:
                return error.code == "supervision-lost"

        until(noticed, "the end of the guard")
        return place.leftovers() == []


def passwords_stay_out_of_logs(here: Path) -> bool:
    """An engine that prints its proxy and a value of --env."""
    with DockerPlace(here).opened() as place:
        launch = place.launch("environment", env={"FOO": "Bearer s3cr3t-s3cr3t", "HTTPS_PROXY": "http://u:passw0rd@p:1"})
        launch = msgspec.structs.replace(launch, hidden=("Bearer s3cr3t-s3cr3t",), network=True)
        running = place.sandbox.start(launch, place.sandbox.site(), here / "log")
        until(lambda: running.exit_status() is not None, "the engine's end")
        running.stop()
        text = (here / "log").read_text()
    private = (here / "log").stat().st_mode & 0o077 == 0
    return private and "FOO" in text and "s3cr3t" not in text and "passw0rd" not in text


def nothing_is_left(_here: Path) -> bool:
    """Containers, networks and tokens of ended processes, after all of this."""
    with Daemon() as daemon:
        left = [one for one in leftovers(daemon) if one.state != "kept" and one.owner_pid in (os.getpid(), None)]
        for one in left:
            remove(daemon, one)
    return not left and not [path for place in SECRET_PLACES for path in Path(place).glob(f"{SECRETS_PREFIX}*")]


ATTEMPTS: Final[tuple[Callable[[Path], bool], ...]] = (
    shared_file_runs_nothing, shared_image_is_not_started, folders_of_the_user_stay, links_are_not_followed,
    slow_daemons_hold_nobody, a_living_owner_is_believed, a_killed_guard_is_noticed, passwords_stay_out_of_logs,
    nothing_is_left,
)  # fmt: skip


def main() -> None:
    broken = 0
    for attempt in ATTEMPTS:
        with tempfile.TemporaryDirectory(prefix="harness-red-team-") as name:
            held = attempt(Path(name))
        broken += not held
        print(f"{'held' if held else 'BROKEN':>6}  {attempt.__name__.replace('_', ' ')}", flush=True)
    sys.exit(broken)


if __name__ == "__main__":
    main()
