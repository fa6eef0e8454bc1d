"""What vLLM's releases do with memory when they start: the rules that a fit and an allocation share.

Read in the releases' own source: vllm/v1/worker/gpu_worker.py (``determine_available_memory``), vllm/v1/worker/utils.py
(``request_memory``), vllm/v1/core/kv_cache_utils.py (``check_enough_kv_cache_memory``), vllm/config.
"""

from __future__ import annotations

import re
from typing import Final

_RELEASE: Final = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")

#: ``--kv-cache-memory-bytes`` exists.
KV_BYTES: Final = (0, 10, 2)
#: CUDA graphs are estimated and taken out of the utilisation's budget; before, they lie on top of it.
GRAPHS_IN_BUDGET: Final = (0, 20, 0)
#: The block that is never used (block 0) no longer counts when a start is checked.
NULL_BLOCK_CHECKED: Final = (0, 29, 0)


def release(version: str | None) -> tuple[int, int, int] | None:
    """Major, minor and patch of ``0.19.2rc1.dev134+g…``, ``v0.10.1.1`` or ``0.32.0+cpu``; ``None`` where there is none."""
    found = _RELEASE.match(version or "")
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))


def at_least(version: str | None, first: tuple[int, int, int]) -> bool:
    """Whether a version is ``first`` or newer; an unknown one is not."""
    known = release(version)
    return known is not None and known >= first
