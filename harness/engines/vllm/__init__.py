"""vLLM: its recipe and its models' files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engines.base import Engine
    from harness.engines.policy import Policy


def get_policy() -> Policy:
    """What it decides."""
    from harness.engines.vllm.policy import VllmPolicy

    return VllmPolicy()


def get_recipe() -> Engine:
    """How it is started and asked."""
    from harness.engines.vllm.recipe import Vllm

    return Vllm()
