"""What llama-server decides: llama.cpp's fit places layers, and one batch holds at every context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from harness.engines.policy import Policy
from harness.prediction.rules import FIT_TARGET
from harness.units import MIB

#: The program of the embedded one, which Python runs.
PROGRAM: Final = "xllamacpp_server.py"
#: The variable for the name under which it answers (common/arg.cpp).
ALIAS: Final = "LLAMA_ARG_ALIAS"


class LlamaServerPolicy(Policy):
    """llama-server's decisions."""

    name = "llama-server"
    title = "llama-server"
    has_dry_runs = True
    loads_files = True
    name_variables = (ALIAS,)

    def runs(self, words: Sequence[str]) -> bool:
        """By its program; Ollama starts one too, from its own folder."""
        if any(word.rpartition("/")[2] == PROGRAM for word in words[1:3]):
            return True
        return words[0].rpartition("/")[2] == "llama-server" and "/ollama/" not in words[0]

    def serve_environment(self, model: str, context: int) -> dict[str, str]:
        """The name under which it answers."""
        return {ALIAS: model}

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        """``--fit-target`` (``LLAMA_ARG_FIT_TARGET``, MiB); nothing is kept free with ``LLAMA_ARG_FIT=off``."""
        if env.get("LLAMA_ARG_FIT") == "off":
            return 0
        target = env.get("LLAMA_ARG_FIT_TARGET", "").partition(",")[0]  # a list has one value a device
        return int(target) * MIB if target.isdigit() else FIT_TARGET
