"""GPUs of this machine in a run: which are used, and how they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.engines.base import Options
from harness.errors import HarnessError, UnavailableError, UsageError
from harness.model.gpu import LocalGpu
from harness.model.trace import MeterName


def has_device() -> bool:
    """Whether the kernel knows an NVIDIA GPU (under WSL2: any GPU)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or on_wsl()


def on_wsl() -> bool:
    """Whether this is WSL2, whose driver gives no memory by process (CUDA on WSL User Guide, "Known Limitations")."""
    return Path("/dev/dxg").exists()


def nvidia_gpus(options: Options) -> tuple[tuple[LocalGpu, ...], MeterName, str]:
    """The NVIDIA GPUs of a run, the meter that can measure them, and that in words.

    Raises:
        UnavailableError: the driver cannot be asked, with its reason, or knows no such GPU. UsageError: several instances
            of one split GPU.
    """
    from harness.meters.nvml import gpus

    found = gpus()
    chosen = [gpu for gpu in found if options.gpus.mode == "all" or {gpu.uuid, gpu.key} & set(options.gpus.ids)]
    if not chosen:
        there = ", ".join(f"{gpu.key}: {gpu.uuid}" for gpu in found) or "none"
        raise UnavailableError(f"the driver has no such GPU (it has {there})", code="no-such-gpu")
    _refuse_several_instances(chosen)
    meter, words = _meter(chosen)
    return tuple(chosen), meter, words


def driven_gpus(listed: Sequence[LocalGpu]) -> tuple[LocalGpu, ...]:
    """The NVIDIA GPUs that an engine lists by their titles (Vulkan's names are the driver's own).

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
    for one in listed:
        gpu = next((gpu for gpu in left if gpu.name == one.name), None)
        if gpu is None:
            return ()
        left.remove(gpu)
        found.append(gpu)
    return tuple(found)


def used_by_default(listed: Sequence[LocalGpu]) -> tuple[LocalGpu, ...]:
    """Of the devices that llama.cpp lists, those that it uses where none is named.

    Integrated GPUs only where there is no other (src/llama.cpp, ``llama_prepare_model_devices``).
    """
    from harness.meters.drm_devices import drm_gpus, matching

    here = drm_gpus() if len(listed) > 1 else []
    shared = {one.key for one in listed for gpu in matching([one], here) if gpu.shared}
    return tuple(one for one in listed if one.key not in shared) or tuple(listed)


def _refuse_several_instances(chosen: Sequence[LocalGpu]) -> None:
    instances = [gpu for gpu in chosen if gpu.mig]
    if len(instances) > 1:
        raise UsageError(
            f"GPU {instances[0].key} is split into {len(instances)} instances (MIG), and an engine can use one of them",
            hint=f"--gpus with one of {', '.join(str(gpu.uuid) for gpu in instances)}",
            code="mig-instances",
        )


def _meter(chosen: Sequence[LocalGpu]) -> tuple[MeterName, str]:
    if any(gpu.shared for gpu in chosen):
        return "nvml", "measured by NVML, process by process: it shares the machine's memory and has no size of its own"
    if any(gpu.total_bytes is None for gpu in chosen):
        return "log", "whose driver does not say how much memory it has, so memory is logged, not measured"
    if on_wsl():
        return "nvml", "measured by NVML as the rise of the whole GPU: under WSL2 the driver gives no figure by process"
    return "nvml", "measured by NVML"
