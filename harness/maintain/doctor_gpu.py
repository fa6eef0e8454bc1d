"""What calibrating an engine in a container with an NVIDIA GPU needs, looked at one by one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.inventory.docker import ANSWER_LIMIT, gpu_path
from harness.inventory.gpus import has_device, on_wsl
from harness.inventory.machine import LocalMachine
from harness.model.finding import Finding
from harness.model.gpu import LocalGpu
from harness.units import GIB, format_size

if TYPE_CHECKING:
    from harness.sandboxes.docker_client import Daemon


#: Below this, bytes, the image of an engine and a model of some billion parameters are likely not to fit.
ROOM: Final = 20 * GIB
#: The number of the first PID namespace of every Linux (include/linux/proc_ns.h, ``PROC_PID_INIT_INO``).
_FIRST_NAMESPACE: Final = "pid:[4026531836]"


def nvidia_findings(machine: LocalMachine) -> list[Finding]:
    """The driver, its GPUs, and whether memory can be had by process."""
    found = machine.nvidia
    if isinstance(found, HarnessError):
        if found.code == "no-gpu":
            return [
                Finding(subject="NVIDIA GPU", code="gpu-none", state="missing", text="the driver answers, but knows no GPU")
            ]
        hint = (
            "the kernel knows an NVIDIA GPU: is its driver's library (libnvidia-ml.so.1) installed?" if has_device() else None
        )
        return [Finding(subject="NVIDIA driver", code=found.code, state="missing", text=found.message, hint=hint)]
    return [*(_gpu(gpu) for gpu in found), _driver(found[0].driver), _process_memory(found), _pid_namespace()]


def _gpu(gpu: LocalGpu) -> Finding:
    subject = f"NVIDIA GPU {gpu.key}"
    if gpu.shared:
        return Finding(
            subject=subject, code="gpu-unified", state="note",
            text=f"{gpu.name} shares the machine's memory: {format_size(gpu.free_bytes)} are free for it and everything else",
            hint="its memory is measured process by process; what is free is what the machine has left",
        )  # fmt: skip
    if gpu.total_bytes is None:
        return Finding(
            subject=subject, code="gpu-silent", state="note", text=f"{gpu.name} does not say how much memory it has",
            hint="its calibrations are logged, not measured",
        )  # fmt: skip
    text = f"{gpu.name}, {format_size(gpu.total_bytes)}, {gpu.uuid}"
    if gpu.mig:
        hint = f"one instance of a split GPU: --gpus {gpu.uuid} chooses it"
        return Finding(subject=subject, code="gpu-mig", state="note", text=text, hint=hint)
    return Finding(subject=subject, code="gpu-ok", state="ok", text=text)


def _driver(version: str | None) -> Finding:
    if not (version or "").partition(".")[0].isdigit():
        return Finding(subject="NVIDIA driver", code="driver-unknown", state="note", text="it does not say its version")
    return Finding(subject="NVIDIA driver", code="driver-ok", state="ok", text=f"{version}")


def _process_memory(found: Sequence[LocalGpu]) -> Finding:
    """What the driver says of the processes that are on the GPUs now."""
    subject = "memory by process"
    if on_wsl():
        return Finding(
            subject=subject, code="wsl", state="note", text="WSL2 gives none: the rise of the whole GPU is used",
            hint="close everything else that uses the GPU before you calibrate",
        )  # fmt: skip
    from harness.meters.nvml import NvmlMeter

    meter = NvmlMeter([gpu.uuid for gpu in found if gpu.uuid])
    try:
        processes = meter.occupancy().processes
    except HarnessError as error:
        return Finding(subject=subject, code=error.code, state="missing", text=error.message)
    finally:
        meter.close()
    if not processes:
        text = "no process is on a GPU now, so this cannot be tried; a calibration says what it finds"
        return Finding(subject=subject, code="process-memory-untried", state="ok", text=text)
    if not any(Path(f"/proc/{pid}").exists() for pid in processes):
        return Finding(
            subject=subject, code="pids-foreign", state="missing",
            text="the driver names processes that are not visible here",
            hint="harness runs in a container: start that with pid: host",
        )  # fmt: skip
    if not all(processes.values()):
        return Finding(
            subject=subject, code="process-memory-none", state="note",
            text="the driver gives no figure for a process: the rise of the whole GPU is used, while no other process uses it",
            hint="close everything else that uses the GPU before you calibrate",
        )  # fmt: skip
    used = ", ".join(f"process {pid} {format_size(size)}" for pid, size in sorted(processes.items()))
    return Finding(subject=subject, code="process-memory-ok", state="ok", text=f"the driver gives it ({used})")


def _pid_namespace() -> Finding:
    subject = "process IDs"
    try:
        first = str(Path("/proc/self/ns/pid").readlink()) == _FIRST_NAMESPACE
    except OSError:
        first = True  # nothing speaks against it
    if first:
        return Finding(subject=subject, code="pids-ok", state="ok", text="those of the machine, as the driver names them")
    return Finding(
        subject=subject, code="pids-own", state="note", text="harness runs in a PID namespace of its own (a container)",
        hint="if the driver's processes are not found, start that container with pid: host",
    )  # fmt: skip


def docker_findings() -> list[Finding]:
    """The daemon, how it hands out GPUs, its disk, and what harness has left with it."""
    from harness.sandboxes.docker_client import Daemon

    try:
        with Daemon(limit=ANSWER_LIMIT) as daemon:
            return list(_of_daemon(daemon))
    except HarnessError as error:
        code = "docker-not-permitted" if error.code == "not-permitted" else error.code
        return [Finding(subject="Docker", code=code, state="missing", text=error.message, hint=error.hint)]


def _of_daemon(daemon: Daemon) -> Iterator[Finding]:
    from harness.sandboxes.daemon import refusal
    from harness.sandboxes.leftovers import leftovers

    facts = daemon.facts()
    refused = refusal(facts)
    if refused is not None:
        yield Finding(subject="Docker", code=refused.code, state="missing", text=refused.message, hint=refused.hint)
        return
    yield Finding(subject="Docker", code="docker-ok", state="ok", text=f"{facts.version or ''} answers at {facts.address}")
    path = gpu_path(facts)
    if path is not None:
        yield Finding(subject="GPUs in containers", code="gpu-runtime-ok", state="ok", text=f"by {path}")
    else:
        yield Finding(
            subject="GPUs in containers", code="gpu-runtime-missing", state="missing" if has_device() else "note",
            text="Docker has neither the nvidia runtime, nor its hook, nor a CDI device of a GPU",
            hint="install the NVIDIA Container Toolkit, nvidia-ctk runtime configure --runtime=docker, restart Docker"
            if has_device() else "only a machine with an NVIDIA GPU needs it",
        )  # fmt: skip
    if facts.data_root is not None and Path(facts.data_root).is_dir():
        yield _disk(Path(facts.data_root))
    abandoned = sum(one.state == "abandoned" for one in leftovers(daemon))
    if abandoned:
        yield Finding(
            subject="leftovers", code="leftovers", state="note", text=f"{abandoned} containers or volumes of ended runs",
            hint="to remove them: harness clean --yes",
        )  # fmt: skip


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{format_size(free)} free at {folder}, where Docker keeps images and models"
    if free < ROOM:
        hint = "an engine's image and a model of some billion parameters may not fit: docker system df says what takes room"
        return Finding(subject="disk for models", code="disk-low", state="note", text=text, hint=hint)
    return Finding(subject="disk for models", code="disk-ok", state="ok", text=text)
