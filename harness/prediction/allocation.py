"""A start of an engine that is sized by what it is given: what will run, and the options that hold its sequences."""

from __future__ import annotations

from typing import Literal

import msgspec

Lever = Literal["kv-cache-memory-bytes", "gpu-memory-utilization"]


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What will run; ``None`` is taken from the calibration."""

    version: str | None = None
    gpu: str | None = None
    tensor_parallel: int | None = None
    dtype: str | None = None


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """One start of vLLM; bytes of one GPU. ``blocks`` are those that the sequences need, ``spare_blocks`` come on top."""

    model: str
    context: int
    concurrency: int
    lever: Lever
    utilization: float
    block_size: int
    block_bytes: int
    blocks: int
    spare_blocks: int
    kv_cache_bytes: int
    footprint_bytes: int
    required_bytes: int
    margin_bytes: int
    available_bytes: int
    max_context: int
    flags: tuple[str, ...]
