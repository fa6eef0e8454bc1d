"""Small GGUF files with a true header, and zeros for weights."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

ALIGNMENT = 32
#: A model of two layers whose embeddings are tied; (tensor, elements as F32).
TINY = (("token_embd.weight", 640), ("blk.0.attn_q.weight", 96), ("blk.1.attn_q.weight", 160), ("output_norm.weight", 8))


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _field(key: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    return _text(key) + struct.pack("<II", 4, value)


def write_gguf(
    path: Path,
    *,
    train_context: int = 4096,
    tensors: Sequence[tuple[str, int]] = TINY,
    extra: Mapping[str, str | int] | None = None,
) -> Path:
    """Write a GGUF (version 3) of architecture llama; layout: ggml/docs/gguf.md of llama.cpp."""
    fields: dict[str, str | int] = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.block_count": 2,
        "llama.context_length": train_context,
        **(extra or {}),
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(_field(*item) for item in fields.items())
    offset = 0
    for name, elements in tensors:
        head += _text(name) + struct.pack("<IQIQ", 1, elements, 0, offset)
        offset += -(-4 * elements // ALIGNMENT) * ALIGNMENT
    head += b"\0" * (-len(head) % ALIGNMENT)
    path.write_bytes(head + b"\0" * offset)
    return path
