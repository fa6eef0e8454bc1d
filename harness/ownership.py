"""Who started it, and does that process still live? Labels of containers and marks of run folders, and what they prove.

A PID alone is not enough: it is given out again, differs between PID namespaces, and means nothing after a reboot. So an owner
is the PID, its start time in clock ticks since boot (proc_pid_stat(5), field 22), the PID namespace, the boot id and the
machine id. Age proves nothing, and no clock is asked: an owner that cannot be seen from here may live.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

#: Every container and volume of harness bears this label with the value ``1``.
LABEL: Final = "harness"
RUN: Final = "harness.run"
#: ``engine`` (a container, volume or network of one run) or ``models`` (a volume that is meant to stay).
KIND: Final = "harness.kind"
OWNER_PID: Final = "harness.owner.pid"
OWNER_START: Final = "harness.owner.start"
OWNER_NAMESPACE: Final = "harness.owner.pidns"
OWNER_BOOT: Final = "harness.owner.boot"
OWNER_CLOCK: Final = "harness.owner.timens"

#: The file that says whose a folder is.
MARK: Final = ".harness-run"

#: ``unknown``: on another machine, in a PID namespace that cannot be seen from here, or not said.
Life = Literal["alive", "gone", "unknown"]


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """A process, so that it is distinguishable from every other one; empty strings where that could not be read.

    ``namespace`` is of PIDs, ``clock`` of times.
    """

    pid: int
    start: str
    namespace: str
    boot: str
    machine: str = ""
    clock: str = ""

    def life(self) -> Life:
        """Whether it runs, as far as that can be proved from here."""
        if self.pid <= 0 or not self.boot:
            return "unknown"
        if self.boot != _boot_id():
            # Another boot: of this machine (it is gone), or of another one.
            return "gone" if self.machine in ("", machine_id()) else "unknown"
        if self.clock and self.clock != _namespace("time"):
            return "unknown"  # start times are of another clock there (time_namespaces(7))
        if self.namespace == _namespace("pid"):
            return "alive" if start_time(self.pid) == self.start else "gone"
        return _life_in(self.namespace, self.pid, self.start)


def this_process() -> Owner:
    """The owner of what is started here."""
    pid = os.getpid()
    return Owner(
        pid=pid, start=start_time(pid) or "", namespace=_namespace("pid"), boot=_boot_id(), machine=machine_id(),
        clock=_namespace("time"),
    )  # fmt: skip


def owner_labels(run: str) -> dict[str, str]:
    """Labels of what this process starts for ``run``."""
    owner = this_process()
    return {
        LABEL: "1",
        RUN: run,
        KIND: "engine",
        OWNER_PID: str(owner.pid),
        OWNER_START: owner.start,
        OWNER_NAMESPACE: owner.namespace,
        OWNER_BOOT: owner.boot,
        OWNER_CLOCK: owner.clock,
    }


def life_of(labels: Mapping[str, str]) -> Life:
    """Whether the owner that labels name lives. A daemon's containers do not outlive its machine's boot."""
    pid = labels.get(OWNER_PID, "")
    return Owner(
        pid=int(pid) if pid.isascii() and pid.isdigit() and len(pid) < 12 else 0,
        start=labels.get(OWNER_START, ""),
        namespace=labels.get(OWNER_NAMESPACE, ""),
        boot=labels.get(OWNER_BOOT, ""),
        clock=labels.get(OWNER_CLOCK, ""),
    ).life()


def start_time(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; ``None`` where there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def machine_id() -> str:
    """What tells this machine from others that share a disk with it (machine-id(5)); empty where it has none."""
    return _read("/etc/machine-id")


def _life_in(namespace: str, pid: int, start: str) -> Life:
    """A process of another PID namespace, by the number that it has there (``NSpid`` of proc_pid_status(5))."""
    seen = False
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if str((folder / "ns" / "pid").readlink()) != namespace:
                continue
            seen = True
            numbers = next((line for line in (folder / "status").read_text().splitlines() if line.startswith("NSpid:")), "")
        except OSError:
            continue  # it ended, or is another user's
        if numbers.split()[-1:] == [str(pid)] and start_time(int(folder.name)) == start:
            return "alive"
    return "gone" if seen and os.geteuid() == 0 else "unknown"


def _boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _namespace(kind: str) -> str:
    try:
        return str(Path("/proc/self/ns", kind).readlink())
    except OSError:
        return ""
