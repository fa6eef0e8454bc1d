"""Ollama: its recipe, its HTTP interface, its models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engines.base import Engine
    from harness.engines.policy import Policy


def get_policy() -> Policy:
    """What it decides."""
    from harness.engines.ollama.policy import OllamaPolicy

    return OllamaPolicy()


def get_recipe() -> Engine:
    """How it is started and asked."""
    from harness.engines.ollama.recipe import Ollama

    return Ollama()
