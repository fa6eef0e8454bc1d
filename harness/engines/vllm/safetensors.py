"""Bytes of a model's tensors from its safetensors files: the table in front of each, nothing else of it.

Format: 8 bytes of little-endian length, then JSON of ``name: {dtype, shape, data_offsets}`` (huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from harness.model.record import Tensors

#: The largest table that is read, bytes (safetensors' own limit).
_LONGEST: Final = 100_000_000
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.")
_EMBEDDING: Final = re.compile(r"embed_tokens|word_embeddings|wte|embed_in")


def tensor_bytes(folder: Path) -> Tensors | None:
    """The tensors of a folder with weights; ``None`` where there is no such file, or one that is not whole."""
    layers: dict[int, int] = {}
    rest = {"embedding": 0, "output": 0}
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        table = _table(path)
        if table is None:
            return None
        for name, size in table.items():
            if layer := _LAYER.search(name):
                layers[int(layer[1])] = layers.get(int(layer[1]), 0) + size
            else:
                rest["embedding" if _EMBEDDING.search(name) else "output"] += size
    if not files:
        return None
    return Tensors(
        layer_bytes=tuple(layers[index] for index in sorted(layers)),
        output_bytes=rest["output"],
        embedding_bytes=rest["embedding"],
    )


def _table(path: Path) -> dict[str, int] | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LONGEST:
                return None
            header: dict[str, Any] = json.loads(file.read(length))
            size = file.seek(0, 2) - 8 - length
        found = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        sizes = {name: int(end) - int(begin) for name, (begin, end) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sizes if all(one >= 0 for one in sizes.values()) and sum(sizes.values()) <= size else None
