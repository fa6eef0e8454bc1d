"""Which leftovers may be removed: only ours, and only those that nobody owns."""

from __future__ import annotations

import os
import signal
import subprocess

from harness.ownership import (
    OWNER_PID,
    OWNER_START,
    life_of,
    owner_labels,
    start_time,
)


def labels(**changes: str) -> dict[str, str]:
    return owner_labels("run") | changes


def test_a_dead_owner_leaves_it() -> None:
    process = subprocess.Popen(["sleep", "600"])
    theirs = labels(**{OWNER_PID: str(process.pid), OWNER_START: start_time(process.pid) or ""})
    assert life_of(theirs) == "alive"

    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its PID is still there

    assert life_of(theirs) == "gone"
    process.wait()
    assert life_of(theirs) == "gone"
