"""Which leftovers may be removed: only ours, and only those that nobody owns."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from harness.sandboxes.ownership import (
    DEADLINE,
    LABEL,
    OWNER_BOOT,
    OWNER_NAMESPACE,
    OWNER_PID,
    OWNER_START,
    is_abandoned,
    owner_labels,
    start_time,
)

NOW = 1_000_000.0


def labels(**changes: str) -> dict[str, str]:
    return owner_labels("run", NOW + 60) | changes


def test_a_live_owner_keeps_its_own() -> None:
    assert not is_abandoned(labels(), NOW)


def test_a_dead_owner_leaves_it() -> None:
    process = subprocess.Popen(["sleep", "600"])
    theirs = labels(**{OWNER_PID: str(process.pid), OWNER_START: start_time(process.pid) or ""})
    assert not is_abandoned(theirs, NOW)

    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its PID is still there

    assert is_abandoned(theirs, NOW)
    process.wait()
    assert is_abandoned(theirs, NOW)


@pytest.mark.parametrize(
    ("changes", "abandoned"),
    [
        ({OWNER_START: "1"}, True),  # the PID was given to another process
        ({OWNER_BOOT: "another"}, True),  # the machine was started anew
        ({OWNER_NAMESPACE: "pid:[1]", OWNER_PID: "999999999"}, False),  # an owner that cannot be seen from here
        ({OWNER_NAMESPACE: "pid:[1]", DEADLINE: str(int(NOW) - 1)}, True),  # but everything ends some day
        ({DEADLINE: str(int(NOW) - 1)}, True),
        ({OWNER_PID: "", DEADLINE: "soon"}, False),  # damaged labels: hands off
        ({OWNER_PID: "-1"}, False),
    ],
)
def test_what_the_labels_say(changes: dict[str, str], abandoned: bool) -> None:
    assert is_abandoned(labels(**changes), NOW) is abandoned


def test_what_is_not_ours_is_never_abandoned() -> None:
    """Without our label nothing else counts, a deadline long past included."""
    theirs = labels(**{OWNER_START: "1", DEADLINE: "1"})
    del theirs[LABEL]

    assert not is_abandoned(theirs, NOW)
    assert not is_abandoned({}, NOW)
