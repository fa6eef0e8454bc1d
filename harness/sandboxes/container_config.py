"""A launch as the Engine API's container configuration (``POST /containers/create``). Pure.

Every container is distinguished from the user's by its labels, is on a bridge of its run that leads nowhere, may gain no
privilege, and is bounded in processes, memory and log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from harness.errors import UsageError
from harness.ownership import KIND, LABEL
from harness.sandboxes.base import SECRETS, GpuRequest, Launch, Mount
from harness.sandboxes.daemon import DaemonFacts

#: Threads count as processes here; a server with many slots and a GPU driver stays far below.
PIDS_LIMIT: Final = 8192
#: Ollama before 0.5.8 unpacks its runners there, and starts them; Docker's own default is noexec.
_SCRATCH: Final = "rw,nosuid,nodev,exec,size=1g,mode=1777"
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")

# distribution/reference: [domain[:port]/]path[:tag][@digest]
_REFERENCE: Final = re.compile(
    r"(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::\d+)?/)?[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[\w][\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_VOLUME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", re.ASCII)


def check_reference(reference: str) -> str:
    """``reference`` if it is the name of an image.

    Raises:
        UsageError: it is not.
    """
    if len(reference) > 400 or not _REFERENCE.fullmatch(reference):
        raise UsageError(f"not the name of an image: {reference!r}")
    return reference


def repository(reference: str) -> str:
    """The repository of a reference, as the daemon writes it: without tag and digest, Docker Hub's names shortened."""
    folder, slash, name = reference.partition("@")[0].rpartition("/")
    return f"{folder}{slash}{name.partition(':')[0]}".removeprefix("docker.io/").removeprefix("library/")


def container_config(
    launch: Launch,
    *,
    image: str,
    port: int,
    network: str,
    labels: Mapping[str, str],
    memory_limit: int,
    daemon: DaemonFacts,
    proxies: Mapping[str, str],
) -> dict[str, Any]:
    """The body of the create request.

    ``port`` is the engine's own, ``network`` the one that only it and this machine are on. ``memory_limit`` is in bytes, swap
    included. ``proxies`` is an environment: its proxy variables are passed if the launch uses the network.
    """
    env = gpu_environment(launch.gpus, daemon)
    if launch.network:
        env |= {name: proxies[name] for name in _PROXIES if proxies.get(name)}
    env |= launch.env
    mounts = [_mount(one, labels) for one in launch.mounts]
    # A volume, not a tmpfs: what an engine writes may be large, and memory is what is being measured.
    writable = [*launch.writable, *([SECRETS] if launch.secrets else [])]
    mounts += [_volume("", target, labels) for target in writable]
    return {
        "Image": image,
        "Cmd": list(launch.argv),
        "Env": [f"{name}={value}" for name, value in env.items()],
        "Labels": dict(labels),
        "ExposedPorts": {f"{port}/tcp": {}},
        "HostConfig": {
            "NetworkMode": network,
            "Mounts": mounts,
            "Tmpfs": {"/tmp": _SCRATCH},  # noqa: S108 - a path inside the container
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "PidsLimit": PIDS_LIMIT,
            "Memory": memory_limit,
            "MemorySwap": memory_limit,
            "RestartPolicy": {"Name": "no"},
            # Named: the daemon's default may keep nothing, or send it away. Bounded: the complete log is attached to.
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "2"}},
            "Init": True,  # a first process that forwards SIGTERM and reaps zombies
            "IpcMode": "host" if launch.ipc_host else "private",
            "DeviceRequests": device_requests(launch.gpus, daemon),
        },
    }


def gpu_environment(gpus: GpuRequest, daemon: DaemonFacts) -> dict[str, str]:
    """The toolkit's variables, always set.

    Images set ``NVIDIA_VISIBLE_DEVICES=all``, and where the default runtime is nvidia that alone hands out every GPU.
    ``void`` gives none (CDI hands out devices by itself).
    """
    if gpus.mode == "none" or _by_cdi(gpus, daemon):
        return {"NVIDIA_VISIBLE_DEVICES": "void"}
    visible = "all" if gpus.mode == "all" else ",".join(gpus.ids)
    return {"NVIDIA_VISIBLE_DEVICES": visible, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}


def device_requests(gpus: GpuRequest, daemon: DaemonFacts) -> list[dict[str, Any]]:
    """The GPUs asked for. ``Count`` and ``DeviceIDs`` exclude each other; a CDI request has no count."""
    if gpus.mode == "none":
        return []
    if _by_cdi(gpus, daemon):
        ids = gpus.ids if gpus.mode == "ids" else ("all",)
        names = [one if "=" in one else f"nvidia.com/gpu={one}" for one in ids]
        return [{"Driver": "cdi", "DeviceIDs": names}]
    request: dict[str, Any] = {"Driver": "", "Capabilities": [["gpu"]]}
    return [request | ({"Count": -1} if gpus.mode == "all" else {"DeviceIDs": list(gpus.ids)})]


def _by_cdi(gpus: GpuRequest, daemon: DaemonFacts) -> bool:
    return daemon.gpu_path == "cdi" or any("=" in one for one in gpus.ids)


def _mount(mount: Mount, labels: Mapping[str, str]) -> dict[str, Any]:
    if mount.kind == "volume":
        if not _VOLUME.fullmatch(mount.source):
            raise UsageError(f"not the name of a Docker volume: {mount.source!r}")
        # Models are downloaded once: where this creates the volume, it is labelled as one that stays.
        kept = {LABEL: labels[LABEL], KIND: "models"}
        return _volume(mount.source, mount.target, kept) | {"ReadOnly": mount.read_only}
    return {"Type": "bind", "Source": mount.source, "Target": mount.target, "ReadOnly": mount.read_only}


def _volume(source: str, target: str, labels: Mapping[str, str]) -> dict[str, Any]:
    return {"Type": "volume", "Source": source, "Target": target, "VolumeOptions": {"Labels": dict(labels)}}
