"""What vLLM's releases do with memory when they start: the rules that a fit and an allocation share.

Read in the releases' own source: vllm/v1/worker/gpu_worker.py (``determine_available_memory``), vllm/v1/worker/utils.py
(``request_memory``), vllm/v1/core/kv_cache_utils.py (``check_enough_kv_cache_memory``), vllm/config.
"""

from __future__ import annotations

from typing import Final

from harness.text import at_least, release

#: ``--kv-cache-memory-bytes`` exists.
KV_BYTES: Final = (0, 10, 2)
#: CUDA graphs are estimated and taken out of the utilisation's budget; before, they lie on top of it.
GRAPHS_IN_BUDGET: Final = (0, 20, 0)
#: The tokens of the cache are the concurrency times the length, also of hybrid models; before, they are those of one group of
#: layers, so that tokens and concurrency agree for models alone whose layers all keep every token.
TOKENS_BY_CONCURRENCY: Final = (0, 20, 0)


def default_utilization(version: str | None) -> float | None:
    """The ``gpu_memory_utilization`` of a start that sets none (``CacheConfig``, vllm/config); ``None``: version unknown."""
    if release(version) is None:
        return None
    return 0.92 if at_least(version, (0, 20, 0)) else 0.9
