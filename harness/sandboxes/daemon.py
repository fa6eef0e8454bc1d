"""What a Docker daemon says of itself, and whether memory can be measured beside it. Pure.

Reads the answers of ``GET /version`` and ``GET /info`` (Docker Engine API 1.41 to 1.51).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from harness.errors import UnavailableError

Flavour = Literal["docker", "docker-desktop", "rootless", "podman"]
#: How a container is given an NVIDIA GPU: the toolkit's runtime hook, or a CDI specification.
GpuPath = Literal["runtime", "cdi"]

_REASONS: Final[dict[Flavour, str]] = {
    "docker-desktop": "Docker Desktop keeps containers in a virtual machine, where their memory cannot be seen",
    "rootless": "rootless Docker hides which processes belong to a container",
    "podman": "this is Podman behind Docker's socket, which may start a container without the GPU that was asked for",
}


class DaemonFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon. ``gpu_path`` is ``None`` where it announces none (it does not know of a hook on its PATH).

    ``data_root`` is the folder in which it keeps images and volumes.
    """

    address: str
    version: str | None = None
    flavour: Flavour = "docker"
    gpu_path: GpuPath | None = None
    cdi_gpus: tuple[str, ...] = ()
    data_root: str | None = None


def read_daemon(address: str, version: Mapping[str, Any], info: Mapping[str, Any]) -> DaemonFacts:
    """The facts of the daemon at ``address`` (``unix:///…`` or ``tcp://…``)."""
    return DaemonFacts(
        address=address,
        version=version.get("Version"),
        flavour=_flavour(version, info),
        gpu_path=_gpu_path(info),
        cdi_gpus=_cdi_gpus(info),
        data_root=info.get("DockerRootDir"),
    )


def remote_refusal(address: str) -> UnavailableError | None:
    """Why a daemon at ``address`` is not even asked; ``None`` for a Unix socket, which is this machine's."""
    if address.startswith("unix://"):
        return None
    return UnavailableError(
        f"the Docker daemon at {address} is not on this machine, so its engines' memory cannot be read here",
        hint="run harness on the machine of the daemon, or unset DOCKER_HOST",
        code="docker-remote",
    )


def refusal(facts: DaemonFacts) -> UnavailableError | None:
    """Why engines are not measured with this daemon; ``None`` where they can be."""
    if (remote := remote_refusal(facts.address)) is not None:
        return remote
    if facts.flavour == "docker":
        return None
    return UnavailableError(
        _REASONS[facts.flavour],
        hint="use Docker Engine on this machine",
        code=f"docker-{facts.flavour.removeprefix('docker-')}",
    )


def _flavour(version: Mapping[str, Any], info: Mapping[str, Any]) -> Flavour:
    components = version.get("Components") or []
    if any("podman" in str(one.get("Name", "")).lower() for one in components):
        return "podman"
    if info.get("OperatingSystem") == "Docker Desktop":
        return "docker-desktop"
    if any("name=rootless" in str(option) for option in info.get("SecurityOptions") or []):
        return "rootless"
    return "docker"


def _gpu_path(info: Mapping[str, Any]) -> GpuPath | None:
    if "nvidia" in (info.get("Runtimes") or {}):
        return "runtime"
    return "cdi" if _cdi_gpus(info) else None


def _cdi_gpus(info: Mapping[str, Any]) -> tuple[str, ...]:
    """CDI names like ``nvidia.com/gpu=0`` (SystemInfo.DiscoveredDevices, Engine API 1.50)."""
    devices = info.get("DiscoveredDevices") or []
    return tuple(str(one.get("ID")) for one in devices if str(one.get("ID", "")).startswith("nvidia.com/gpu="))
