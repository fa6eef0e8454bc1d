"""Recipes: what each engine launches, which requests load and unload a model, and which log dialect it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import UnavailableError
from harness.model.facts import EngineName

if TYPE_CHECKING:
    from harness.engines.base import Engine


def engine_named(name: EngineName) -> Engine:
    """The recipe of an engine.

    Raises:
        UnavailableError: this version of harness has no recipe of that engine.
    """
    if name == "llama-server":
        from harness.engines.llama_server.recipe import LlamaServer

        return LlamaServer()
    if name == "ollama":
        from harness.engines.ollama.recipe import Ollama

        return Ollama()
    if name == "vllm":
        from harness.engines.vllm.recipe import Vllm

        return Vllm()
    raise UnavailableError(f"this harness cannot run {name} yet", code="no-engine")
