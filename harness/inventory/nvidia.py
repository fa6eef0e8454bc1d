"""NVIDIA GPUs of this machine: which of them a run uses, how they are measured, whether a container can have them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.engines.base import Options
from harness.errors import HarnessError, UnavailableError, UsageError
from harness.model.record import Gpu
from harness.model.trace import MeterName
from harness.units import gib

if TYPE_CHECKING:
    from harness.meters.nvml import NvmlGpu
    from harness.sandboxes.daemon import DaemonFacts

#: What dockerd looks for on its PATH to serve ``--gpus``, registered as a runtime or not (moby, daemon/nvidia_linux.go).
HOOK: Final = "nvidia-container-runtime-hook"
#: How long a daemon may take to say what it is, seconds, before a choice is made without it.
ANSWER_LIMIT: Final = 3
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def has_device() -> bool:
    """Whether the kernel knows an NVIDIA GPU (under WSL2: any GPU)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or on_wsl()


def on_wsl() -> bool:
    """Whether this is WSL2, whose driver gives no memory by process (CUDA on WSL User Guide, "Known Limitations")."""
    return Path("/dev/dxg").exists()


def docker_gpu_obstacle() -> str | None:
    """Why a container cannot be given an NVIDIA GPU here; ``None`` if it can. Asks the daemon; takes well under a second."""
    if not has_device():
        return "there is no NVIDIA GPU"
    facts = _daemon()
    if isinstance(facts, str):
        return facts
    return None if gpu_path(facts) else "Docker has neither the nvidia runtime, nor its hook, nor a CDI device of a GPU"


def docker_obstacle() -> str | None:
    """Why no container can be measured here, with a GPU or without; ``None`` if one can."""
    facts = _daemon()
    return facts if isinstance(facts, str) else None


def _daemon() -> DaemonFacts | str:
    """This machine's daemon, or why its containers cannot be measured."""
    from harness.sandboxes.daemon import refusal
    from harness.sandboxes.docker_client import Daemon

    try:
        with Daemon(limit=ANSWER_LIMIT) as daemon:
            facts = daemon.facts()
    except HarnessError as error:
        return error.message
    return facts if (refused := refusal(facts)) is None else refused.message


def gpu_path(facts: DaemonFacts) -> str | None:
    """How this machine's daemon gives a container a GPU, in words; ``None`` if it cannot."""
    if facts.gpu_path is not None:
        return {"runtime": "the nvidia runtime", "cdi": f"CDI ({', '.join(facts.cdi_gpus)})"}[facts.gpu_path]
    return f"the hook {HOOK}" if shutil.which(HOOK, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}") else None


def nvidia_gpus(options: Options) -> tuple[tuple[Gpu, ...], MeterName, str]:
    """The NVIDIA GPUs of a run, the meter that can measure them, and that in words.

    Raises:
        UnavailableError: the driver cannot be asked, with its reason, or knows no such GPU. UsageError: several instances
            of one split GPU.
    """
    from harness.meters.nvml import gpus

    found = gpus()
    chosen = [gpu for gpu in found if options.gpus.mode == "all" or {gpu.uuid, str(gpu.index)} & set(options.gpus.ids)]
    if not chosen:
        there = ", ".join(f"{gpu.index}: {gpu.uuid}" for gpu in found) or "none"
        raise UnavailableError(f"the driver knows no such GPU (it has {there})", code="no-such-gpu")
    _refuse_several_instances(chosen)
    meter, words = _meter(chosen)
    return tuple(_recorded(gpu) for gpu in chosen), meter, words


def driven_gpus(titles: Sequence[str]) -> tuple[str, ...]:
    """UUIDs of the NVIDIA GPUs that an engine lists by these titles (Vulkan's names are the driver's own).

    Empty unless all are; of GPUs of one name, the first.
    """
    from harness.meters.nvml import gpus

    if not has_device():
        return ()
    try:
        left = [gpu for gpu in gpus() if not gpu.mig]
    except HarnessError:
        return ()
    found = []
    for title in titles:
        gpu = next((one for one in left if one.name == title), None)
        if gpu is None:
            return ()
        left.remove(gpu)
        found.append(gpu.uuid)
    return tuple(found)


def _refuse_several_instances(chosen: Sequence[NvmlGpu]) -> None:
    instances = [gpu for gpu in chosen if gpu.mig]
    if len(instances) > 1:
        raise UsageError(
            f"GPU {instances[0].index} is split into {len(instances)} instances (MIG), and an engine can use one of them",
            hint=f"--gpus with one of {', '.join(gpu.uuid for gpu in instances)}",
            code="mig-instances",
        )


def _meter(chosen: Sequence[NvmlGpu]) -> tuple[MeterName, str]:
    if any(gpu.unified for gpu in chosen):
        return "nvml", "measured by NVML, process by process: it shares the machine's memory and has no size of its own"
    if any(gpu.memory_bytes is None for gpu in chosen):
        return "log", "whose driver does not say how much memory it has, so memory is logged, not measured"
    if on_wsl():
        return "nvml", "measured by NVML as the rise of the whole GPU: under WSL2 the driver gives no figure by process"
    return "nvml", "measured by NVML"


def _recorded(gpu: NvmlGpu) -> Gpu:
    memory = gib(gpu.memory_bytes) if gpu.memory_bytes else None
    return Gpu(name=gpu.name, uuid=gpu.uuid, memory_gb=memory, driver=gpu.driver)
