"""A load that was not made: what an engine plans to allocate for it, or what arithmetic says. Data."""

from __future__ import annotations

from typing import Literal

import msgspec

from harness.model.facts import CacheFacts

#: ``dry run``: the engine's own plan of every buffer, in bytes; ``formula``: arithmetic from the header.
Method = Literal["dry run", "formula"]


class PlannedLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one load in host memory, without its weights."""

    caches: tuple[CacheFacts, ...]
    recurrent_bytes: int
    compute_bytes: int
    output_bytes: int = 0
    kv_cache_type: str | None = None
    flash_attention: Literal["enabled", "disabled"] | None = None


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a model's caches and compute buffers, of its header.

    ``kv_heads`` has one count a layer, 0 for one that keeps no keys. ``windowed`` says which layers see a ``window`` of tokens
    alone. ``recurrent_bytes`` is the state of one recurrent layer of one sequence. ``known`` is false where the architecture
    has something that is not in here. ``weights_bytes`` are those of all tensors, ``input_bytes`` those that stay on the host
    whatever is on the GPU.
    """

    architecture: str
    train_context: int
    layers: int
    width: int
    heads: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    feed: int
    vocabulary: int
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    recurrent: tuple[bool, ...] = ()
    recurrent_bytes: int = 0
    known: bool = True
    weights_bytes: int = 0
    input_bytes: int = 0
