"""What llama-server decides: llama.cpp's fit places layers, and one batch holds at every context."""

from __future__ import annotations

from harness.engines.policy import Policy
from harness.prediction.rules import FIT_TARGET
from harness.units import MIB


class LlamaServerPolicy(Policy):
    """llama-server's decisions."""

    name = "llama-server"
    title = "llama-server"

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        """``--fit-target`` (``LLAMA_ARG_FIT_TARGET``, MiB); nothing is kept free with ``LLAMA_ARG_FIT=off``."""
        if env.get("LLAMA_ARG_FIT") == "off":
            return 0
        target = env.get("LLAMA_ARG_FIT_TARGET", "")
        return int(target) * MIB if target.isdigit() else FIT_TARGET
