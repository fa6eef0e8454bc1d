"""What vLLM's releases do with memory when they start: the rules that a fit and an allocation share.

Read in the releases' own source: vllm/v1/worker/gpu_worker.py (``determine_available_memory``), vllm/v1/worker/utils.py
(``request_memory``), vllm/v1/core/kv_cache_utils.py (``check_enough_kv_cache_memory``), vllm/config.
"""

from __future__ import annotations

from typing import Final

#: ``--kv-cache-memory-bytes`` exists.
KV_BYTES: Final = (0, 10, 2)
#: CUDA graphs are estimated and taken out of the utilisation's budget; before, they lie on top of it.
GRAPHS_IN_BUDGET: Final = (0, 20, 0)
