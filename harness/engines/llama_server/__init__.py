"""llama.cpp's llama-server, and the one that comes from PyPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engines.base import Engine
    from harness.engines.policy import Policy


def get_policy() -> Policy:
    """What it decides."""
    from harness.engines.llama_server.policy import LlamaServerPolicy

    return LlamaServerPolicy()


def get_recipe() -> Engine:
    """How it is started and asked."""
    from harness.engines.llama_server.recipe import LlamaServer

    return LlamaServer()
