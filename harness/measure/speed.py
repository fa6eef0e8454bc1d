"""What is timed in a calibration, and when nothing is put on the host for it."""

from __future__ import annotations

from typing import Final

from harness.engines.base import Source
from harness.engines.policy import Policy

#: Prompts of the speed load, tokens: two depths, the first one repeated to know how far speeds repeat.
SPEED_PROMPTS: Final = (64, 64, 64, 1536)
#: Prompts of the load with nothing on the GPU: too short for llama.cpp to send their products there (32 tokens).
HOST_SPEED_PROMPTS: Final = (16, 16, 16)
#: That load is made only if the weights take at most this share of the memory that is available.
HOST_SHARE: Final = 0.6


def no_host_speed(policy: Policy, source: Source) -> str | None:
    """Why speed with nothing on the GPU is not measured; ``None`` if it is."""
    from harness.meters.host import available_memory

    if not policy.runs_on_host:
        return "this engine does not run on the host"
    if source.embedding:
        return "an embedding model writes nothing"
    size, available = weights_bytes(source), available_memory()
    if size is None:
        return "the size of the weights is not known"
    if available is None or size > HOST_SHARE * available:
        return "the weights would take more than 60 % of the memory that is available"
    return None


def weights_bytes(source: Source) -> int | None:
    """Bytes of a model's weights, from its file or its tensors; ``None`` where neither is known."""
    if source.path is not None:
        return source.path.stat().st_size
    tensors = source.tensors
    return None if tensors is None else sum(tensors.layer_bytes) + tensors.output_bytes + tensors.embedding_bytes
