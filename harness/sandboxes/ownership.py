"""Whose container is it? Labels that say who started one, and the rule by which an abandoned one is told.

A PID alone is not enough: it is given out again, differs between PID namespaces, and means nothing after a reboot. So
the labels hold the PID, its start time in clock ticks since boot (proc_pid_stat(5), field 22), the PID namespace and
the boot id, and a deadline for everything that these cannot tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: Every container and volume of harness bears this label with the value ``1``.
LABEL: Final = "harness"
RUN: Final = "harness.run"
#: ``engine`` (a container or a volume of one run) or ``models`` (a volume that is meant to stay).
KIND: Final = "harness.kind"
OWNER_PID: Final = "harness.owner.pid"
OWNER_START: Final = "harness.owner.start"
OWNER_NAMESPACE: Final = "harness.owner.pidns"
OWNER_BOOT: Final = "harness.owner.boot"
#: Unix time after which nobody needs it any more.
DEADLINE: Final = "harness.deadline"


def owner_labels(run: str, deadline: float) -> dict[str, str]:
    """Labels of what this process starts for ``run``; ``deadline`` is Unix time in seconds."""
    return {
        LABEL: "1",
        RUN: run,
        KIND: "engine",
        OWNER_PID: str(os.getpid()),
        OWNER_START: start_time(os.getpid()) or "",
        OWNER_NAMESPACE: _pid_namespace(),
        OWNER_BOOT: _boot_id(),
        DEADLINE: str(int(deadline)),
    }


def is_abandoned(labels: Mapping[str, str], now: float) -> bool:
    """Whether something of harness's has no owner any more: dead, rebooted away, or past its deadline.

    What does not bear our label, and what a live owner or one that we cannot see holds, is not abandoned.
    """
    if labels.get(LABEL) != "1":
        return False
    deadline = labels.get(DEADLINE, "")
    if deadline.isdigit() and int(deadline) < now:
        return True
    if not labels.get(OWNER_BOOT) or not labels.get(OWNER_PID, "").isdigit():
        return False
    if labels[OWNER_BOOT] != _boot_id():
        return True
    if labels.get(OWNER_NAMESPACE) != _pid_namespace():
        return False
    return start_time(int(labels[OWNER_PID])) != labels.get(OWNER_START)


def start_time(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; ``None`` where there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
