"""A process that starts an engine in a sandbox, to be killed at a stage: ``python -m tests.support.victim …``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.sandboxes.locks import hold
from tests.support.places import Place, make_place, reapers_of
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]


class Victim:
    """The test's side: starts the process, follows its stages, kills it."""

    def __init__(self, place: str, folder: Path, *, mark: str | None = None, stop_at: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.victim", place, str(folder), mark or "", stop_at],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,  # a process group, as a terminal would make it
        )
        self.pid = self._process.pid

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()

    def wait_for_stage(self, stage: str) -> dict[str, Any]:
        """What the process says of a stage, once it is there."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["stage"] == stage:
                return said
        raise AssertionError(f"the victim ended ({self._process.wait()}) before it was {stage!r}")

    def let_go(self) -> None:
        """Let it go on beyond the stage at which it was to stop."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def wait_for_family(self) -> list[int]:
        """PIDs of the engine, once all of its processes are up."""
        pids: list[int] = self.wait_for_stage("running")["pids"]
        return pids

    def reapers(self) -> list[str]:
        """Its reapers that are still at work."""
        return reapers_of(self.pid)

    def die(self, number: signal.Signals) -> None:
        """Kill it with -9, or signal its process group as a terminal or a supervisor does."""
        if number == signal.SIGKILL:
            os.kill(self.pid, number)
        else:
            os.killpg(self.pid, number)
        self._process.wait(200)


def kill_three_at(stage: str, place: Place, folder: Path) -> None:
    """Kill -9 three processes, one after the other, just beyond a stage; nothing of theirs may stay."""
    reapers: list[Victim] = []
    for _ in range(3):
        with Victim(place.name, folder, mark=place.mark, stop_at=stage) as victim:
            victim.wait_for_stage(stage)
            victim.let_go()
            victim.die(signal.SIGKILL)
            reapers.append(victim)
    until(lambda: not any(victim.reapers() for victim in reapers), f"the end of the reapers, killed when {stage}")
    until(lambda: not place.leftovers(), f"nothing left, killed when {stage}")


def reach(stage: str, stop_at: str, **said: object) -> None:
    sys.stdout.write(json.dumps({"stage": stage, **said}) + "\n")
    sys.stdout.flush()
    if stage == stop_at:
        sys.stdin.readline()


def main(place_name: str, folder: str, mark: str, stop_at: str) -> None:
    place = make_place(place_name, Path(folder), mark or None, hook=lambda step: reach(step, stop_at))
    with hold([place.mark], Path(folder, "locks")), place.opened():
        reach("opened", stop_at)
        log = Path(folder, "victim.log")
        log.unlink(missing_ok=True)
        reach("starting", stop_at)
        running = place.start("family", log="victim.log")
        reach("returned", stop_at)
        until(lambda: b"grandchild up" in log.read_bytes() and b"detached up" in log.read_bytes(), "the family")
        reach("running", stop_at, pids=sorted(running.pids()), reaper=place.reaper.pid)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
