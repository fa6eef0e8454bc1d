"""What harness has left on a daemon, and the removal of orphaned resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from harness.ownership import KIND, LABEL, OWNER_PID, RUN, Life, life_of
from harness.sandboxes.docker_client import Daemon


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """A container, volume or network that bears our label.

    ``state`` is ``abandoned`` (its harness has provably ended: safe to remove), ``in-use`` (its harness still runs),
    ``unknown`` (it cannot be seen from here) or ``kept`` (models that were downloaded to stay).
    """

    kind: Literal["container", "volume", "network"]
    id: str
    name: str
    state: Literal["abandoned", "in-use", "unknown", "kept"]
    run: str | None = None
    owner_pid: int | None = None

    @property
    def removal(self) -> str:
        """The arguments of ``docker`` that remove it."""
        return f"rm -f {self.name}" if self.kind == "container" else f"{self.kind} rm {self.name}"


def leftovers(daemon: Daemon) -> list[Leftover]:
    """Everything on the daemon that bears our label; nothing else is ever looked at."""
    mine = f"{LABEL}=1"
    found = [_leftover("container", one["Id"], one["Names"][0].lstrip("/"), one["Labels"]) for one in daemon.containers(mine)]
    found += [_leftover("volume", one["Name"], one["Name"], one["Labels"]) for one in daemon.volumes(mine)]
    found += [_leftover("network", one["Id"], one["Name"], one["Labels"]) for one in daemon.networks(mine)]
    return found


def remove(daemon: Daemon, leftover: Leftover) -> None:
    """Remove one of :func:`leftovers`."""
    if leftover.kind == "container":
        daemon.remove(leftover.id)
    elif leftover.kind == "volume":
        daemon.remove_volume(leftover.id)
    else:
        daemon.remove_network(leftover.id)


def sweep(daemon: Daemon) -> list[Leftover]:
    """Remove what is abandoned, containers before the volumes and networks that they use; what was removed."""
    abandoned = [one for one in leftovers(daemon) if one.state == "abandoned"]
    for one in abandoned:
        remove(daemon, one)
    return abandoned


def _leftover(kind: Literal["container", "volume", "network"], identity: str, name: str, labels: Mapping[str, Any]) -> Leftover:
    pid = str(labels.get(OWNER_PID, ""))
    life = life_of({key: str(value) for key, value in labels.items()})
    states: dict[Life, Literal["abandoned", "in-use", "unknown"]] = {
        "gone": "abandoned", "alive": "in-use", "unknown": "unknown",
    }  # fmt: skip
    return Leftover(
        kind=kind,
        id=identity,
        name=name,
        state="kept" if labels.get(KIND) == "models" else states[life],
        run=labels.get(RUN),
        owner_pid=int(pid) if pid.isdecimal() else None,
    )
