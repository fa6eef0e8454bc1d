"""What harness has left on a daemon, and the removal of what nobody owns any more."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.ownership import DEADLINE, KIND, LABEL, OWNER_PID, RUN, is_abandoned


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """A container or volume that bears our label.

    ``state`` is ``abandoned`` (its harness is no more: safe to remove), ``in-use`` (its harness still runs) or ``kept``
    (models that were downloaded to stay).
    """

    kind: Literal["container", "volume"]
    id: str
    name: str
    state: Literal["abandoned", "in-use", "kept"]
    run: str | None = None
    owner_pid: int | None = None
    deadline: int | None = None


def leftovers(daemon: Daemon) -> list[Leftover]:
    """Everything on the daemon that bears our label; nothing else is ever looked at."""
    now = time.time()
    mine = f"{LABEL}=1"
    found = [
        _leftover("container", one["Id"], one["Names"][0].lstrip("/"), one["Labels"], now) for one in daemon.containers(mine)
    ]
    found += [_leftover("volume", one["Name"], one["Name"], one["Labels"], now) for one in daemon.volumes(mine)]
    return found


def remove(daemon: Daemon, leftover: Leftover) -> None:
    """Remove one of :func:`leftovers`."""
    if leftover.kind == "container":
        daemon.remove(leftover.id)
    else:
        daemon.remove_volume(leftover.id)


def sweep(daemon: Daemon) -> list[Leftover]:
    """Remove what is abandoned, containers before the volumes that they use; what was removed."""
    abandoned = [one for one in leftovers(daemon) if one.state == "abandoned"]
    for one in abandoned:
        remove(daemon, one)
    return abandoned


def _leftover(
    kind: Literal["container", "volume"], identity: str, name: str, labels: Mapping[str, Any], now: float
) -> Leftover:
    pid, deadline = str(labels.get(OWNER_PID, "")), str(labels.get(DEADLINE, ""))
    abandoned = is_abandoned(labels, now)
    return Leftover(
        kind=kind,
        id=identity,
        name=name,
        state="kept" if labels.get(KIND) == "models" else "abandoned" if abandoned else "in-use",
        run=labels.get(RUN),
        owner_pid=int(pid) if pid.isdigit() else None,
        deadline=int(deadline) if deadline.isdigit() else None,
    )
