"""Ollama on this machine: the driver that it needs, its program, and servers of it that run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from harness.engines.base import Engine, Options
from harness.engines.registry import running_servers
from harness.engines.running import RunningServer, held_by
from harness.errors import HarnessError
from harness.model.finding import Finding
from harness.model.gpu import LocalGpu
from harness.text import counted

#: Ollama >= 0.30.11 leaves GPUs of an older driver alone and only warns in its log; newer GPUs need the second figure.
DRIVER: Final = 550
DRIVER_NEW_GPUS: Final = 570


def ollama_findings(engine: Engine, gpus: Sequence[LocalGpu]) -> Iterator[Finding]:
    """Whether it uses these NVIDIA GPUs, what ``--engine ollama --sandbox process`` would run, and what runs already."""
    if gpus and gpus[0].driver is not None:
        yield from _driver(gpus[0].driver)
    try:
        files = engine.installed(Options())
    except HarnessError as error:
        files, text = (), error.message
    else:
        text = "no program ollama on PATH"
    if files:
        yield Finding(
            subject="Ollama", code="ollama-installed", state="ok",
            text=f"{files[0]}: --engine ollama --sandbox process measures it without Docker",
        )  # fmt: skip
    else:
        yield Finding(
            subject="Ollama", code="ollama-not-installed", state="note", text=text,
            hint="needed only for --engine ollama without Docker",
        )  # fmt: skip
    for server in running_servers(engine.name):
        yield _running(server)


def _driver(version: str) -> Iterator[Finding]:
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) >= DRIVER_NEW_GPUS:
        return
    subject = "Ollama and the NVIDIA driver"
    if int(major) < DRIVER:
        yield Finding(
            subject=subject, code="driver-old", state="missing",
            text=f"{version} is older than {DRIVER}: with it Ollama from 0.30.11 on uses the CPU and says so in its log",
            hint=f"update the driver to {DRIVER_NEW_GPUS} or newer",
        )  # fmt: skip
    else:
        yield Finding(
            subject=subject, code="driver-middle", state="note",
            text=f"{version}: enough for most GPUs; Ollama needs {DRIVER_NEW_GPUS} for the newest",
        )  # fmt: skip


def _running(server: RunningServer) -> Finding:
    settings = ", ".join(f"{name}={value}" for name, value in sorted(server.settings.items()))
    shown = settings or ("no settings of its own" if server.readable else "its settings are another account's to read")
    held = held_by("ollama", [server])
    return Finding(
        subject=f"running Ollama (port {server.port})", code="ollama-running", state="note" if held else "ok",
        text=f"{server.version}: {shown}; it holds {counted(len(server.models), 'model')}",
        hint="; ".join(held) or None,
    )  # fmt: skip
