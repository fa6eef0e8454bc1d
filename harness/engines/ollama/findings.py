"""Ollama without Docker: its program, and servers of it that run."""

from __future__ import annotations

from collections.abc import Iterator

from harness.engines.base import Engine, Options
from harness.engines.registry import running_servers
from harness.engines.running import RunningServer, held_by
from harness.errors import HarnessError
from harness.model.finding import Finding


def ollama_findings(engine: Engine) -> Iterator[Finding]:
    """What ``--engine ollama --sandbox process`` would run, and what runs already."""
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
            hint="only for --engine ollama without Docker is it needed",
        )  # fmt: skip
    for server in running_servers(engine.name):
        yield _running(server)


def _running(server: RunningServer) -> Finding:
    settings = ", ".join(f"{name}={value}" for name, value in sorted(server.settings.items()))
    shown = settings or ("no settings of its own" if server.readable else "its settings are another account's to read")
    held = held_by("ollama", [server])
    return Finding(
        subject=f"running Ollama (port {server.port})", code="ollama-running", state="note" if held else "ok",
        text=f"{server.version}: {shown}; it holds {len(server.models) or 'no'} models",
        hint="; ".join(held) or None,
    )  # fmt: skip
