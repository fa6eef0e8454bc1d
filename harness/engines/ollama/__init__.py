"""Ollama: its recipe, its HTTP interface, its models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engines.base import Engine, RemoteRegistry
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


def get_remote_registry() -> RemoteRegistry:
    """Where its models are pulled from."""
    from harness.engines.ollama.remote import OllamaRegistry

    return OllamaRegistry()


def get_stored_digest(name: str) -> str | None:
    """The digest of a model's weights in the stores of Ollama on this machine that may be read; ``None``: it is in none."""
    import os

    from harness.engines.base import Options
    from harness.engines.ollama.names import stored_digest
    from harness.engines.ollama.native import stores
    from harness.errors import HarnessError

    for folder in stores(Options(), os.environ):
        try:
            if (found := stored_digest(folder, name)) is not None:
                return found
        except (OSError, HarnessError):
            continue  # it may not be read, or is no name of Ollama's
    return None
