"""Host memory: the anonymous memory of an engine's processes, and what the machine has left.

``RssAnon`` of /proc/PID/status (proc(5), Linux >= 4.5) is world-readable and counts what the process wrote to: KV cache,
weights loaded without mmap, and, with glibc's ``MALLOC_PERTURB_``, every buffer that was merely reserved.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from harness.meters.base import Meter
from harness.model.trace import MeterName, Reading
from harness.units import KIB

_RSS_ANON: Final = re.compile(rb"^RssAnon:\s+(\d+) kB", re.MULTILINE)


class HostMeter(Meter):
    """Anonymous memory of processes, summed."""

    name: MeterName = "host"
    #: One read of a small file per process.
    interval: float = 0.05

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def read(self, pids: frozenset[int]) -> Reading:
        """Sum over the processes that still exist."""
        if not pids:
            return Reading(total_bytes=None, reason="the engine has no processes")
        found = [size for pid in pids if (size := self._anonymous(pid)) is not None]
        if not found:
            return Reading(total_bytes=None, reason="none of the engine's processes can be read in /proc")
        return Reading(total_bytes=sum(found))

    def _anonymous(self, pid: int) -> int | None:
        try:
            match = _RSS_ANON.search((self._proc / str(pid) / "status").read_bytes())
        except OSError:
            return None  # it ended between the listing and the reading
        return int(match[1]) * KIB if match else None


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a new process may take: ``MemAvailable``, or less where this process's cgroup has a limit."""
    available, room = machine_available(proc), cgroup_room(proc, cgroup)
    return available if available is None or room is None else min(available, room)


def machine_available(proc: Path = Path("/proc")) -> int | None:
    """``MemAvailable``, bytes, whatever a cgroup allows: a GPU that shares the machine's memory is bound by this alone."""
    try:
        match = re.search(rb"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_bytes(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * KIB if match else None


def cgroup_room(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left below the tightest memory limit of our own cgroup and those above it (v2 or v1); ``None`` without one."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            rooms += _rooms(cgroup, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            rooms += _rooms(cgroup / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def _rooms(root: Path, path: str, limit: str, used: str) -> list[int | None]:
    # Inside a container the path may be the host's, while what is mounted at the root is our own cgroup.
    folder = root / path.lstrip("/")
    return [_room(one, limit, used) for one in (folder, *folder.parents) if one.is_relative_to(root)]


def _room(folder: Path, limit: str, used: str) -> int | None:
    try:
        most, now = (folder / limit).read_text().strip(), (folder / used).read_text().strip()
    except OSError:
        return None
    if not most.isdigit() or not now.isdigit() or int(most) >= 1 << 60:
        return None
    return max(int(most) - int(now), 0)
