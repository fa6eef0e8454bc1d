"""GPUs that NVML does not speak for, and those that sleep, looked at one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.meters.drm_devices import drm_gpus, hidden_processes, is_asleep, pci_displays
from harness.model.finding import Finding
from harness.model.gpu import LocalGpu
from harness.units import format_size


def drm_findings(sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> list[Finding]:
    """GPUs of AMD and Intel, how their memory is read, and who on them cannot be seen."""
    gpus = drm_gpus(sys, proc)
    found = [_gpu(gpu) for gpu in gpus]
    hidden = hidden_processes(proc) if gpus else None
    if hidden is not None:
        found.append(
            Finding(
                subject="other GPU processes", code="drm-others-hidden", state="note",
                text=f"those of other users are not seen: {hidden}",
                hint="close what else uses the GPU before you calibrate, or run harness as root",
            )
        )  # fmt: skip
    return found


def _gpu(gpu: LocalGpu) -> Finding:
    subject, text = f"GPU {gpu.key}", f"{gpu.name} ({gpu.driver}), {format_size(gpu.total_bytes)}"
    if gpu.asleep:
        return Finding(subject=subject, code="drm-asleep", state="note", text=f"{text}: asleep, and not woken", hint=gpu.why)
    if gpu.free_bytes is None:
        hint = f"{gpu.why}; llama-server's own list is used instead, or say --available"
        return Finding(
            subject=subject, code="drm-free-unknown", state="note", text=f"{text}: what is free is unknown", hint=hint
        )
    text = f"{text}, {format_size(gpu.free_bytes)} free"
    if gpu.shared:
        return Finding(
            subject=subject, code="drm-integrated", state="ok", text=f"{text}: it shares the machine's memory",
            hint="what it maps (GTT) counts as its own, takes from what the machine has left, and no container limit sees it",
        )  # fmt: skip
    return Finding(subject=subject, code="drm-ok", state="ok", text=f"{text}, measured by the kernel's own count")


def sleeping_nvidia(sys: Path = Path("/sys")) -> Iterator[Finding]:
    """NVIDIA's GPUs that were asleep before anything was asked: NVML wakes what it is asked about."""
    for device, vendor in pci_displays(sys):
        if vendor == "0x10de" and is_asleep(device):
            yield Finding(
                subject=f"GPU {device.name}", code="gpu-woken", state="note", text="it slept, and asking its driver wakes it",
                hint="so do check, plan and calibrate: NVML has no other way; --available asks nothing",
            )  # fmt: skip
