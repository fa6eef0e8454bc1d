"""Ollama: its recipe, its HTTP interface, its models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engines.base import Engine
    from harness.engines.policy import Policy
    from harness.engines.running import RunningServer


def get_policy() -> Policy:
    """What it decides."""
    from harness.engines.ollama.policy import OllamaPolicy

    return OllamaPolicy()


def get_recipe() -> Engine:
    """How it is started and asked."""
    from harness.engines.ollama.recipe import Ollama

    return Ollama()


def get_servers() -> tuple[RunningServer, ...]:
    """Servers of the user's: at ``OLLAMA_HOST``, and wherever a process ``ollama serve`` says that it listens."""
    import os

    from harness.engines.ollama.servers import running

    return running(os.environ.get("OLLAMA_HOST", ""))
