"""Which processes belong to a container, from the kernel's side.

``/proc/PID/cgroup`` is world-readable and holds the container's id under cgroup v1 and v2, with the cgroupfs and the
systemd driver (``/docker/ID``, ``/system.slice/docker-ID.scope``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_MOUNT: Final = Path("/sys/fs/cgroup")


def holds(pid: int, container: str) -> bool:
    """Whether a process is in the container (its full id)."""
    return pid > 0 and container in _cgroups(pid)


def container_pids(first: int, container: str) -> frozenset[int]:
    """All processes of a container whose first one is ``first``."""
    listed = _listed(first, container)
    if listed is not None:
        return listed
    # No view of the hierarchy (harness in a container of its own): look at every process, which takes milliseconds.
    names = (folder.name for folder in Path("/proc").iterdir())
    return frozenset(int(name) for name in names if name.isdigit() and holds(int(name), container))


def _listed(first: int, container: str) -> frozenset[int] | None:
    """From the container's own list (tens of microseconds), with groups below it; ``None`` where it is not found."""
    for line in _cgroups(first).splitlines():
        number, controllers, path = line.split(":", 2)
        if container not in path or ".." in path:
            continue
        group = _MOUNT / (controllers.removeprefix("name=") if number != "0" else "") / path.lstrip("/")
        try:
            files = list(group.rglob("cgroup.procs"))
            if files:
                return frozenset(int(pid) for file in files for pid in file.read_text().split())
        except (OSError, ValueError):
            continue
    return None


def _cgroups(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
