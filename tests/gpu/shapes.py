"""Models with the shapes of real ones, as GGUF files that need no package and no download.

Weights are one random block over and over, or a hole in the file: every engine allocates the same for them. Format:
ggml/docs/gguf.md of llama.cpp; tensor names: gguf-py/gguf/constants.py (architectures ``llama`` and ``qwen3moe``).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

ALIGNMENT: Final = 32
_U32, _F32, _TEXT, _ARRAY, _I32 = 4, 6, 8, 9, 5
#: ``ggml_type``: elements and bytes of a block.
_TYPES: Final = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34)}
_FILE_TYPES: Final = {"F16": 1, "Q4_0": 2, "Q8_0": 7}
_TILE: Final = 1 << 20


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder; ``experts`` of which ``used`` serve a token, each ``feed`` wide. ``tied``: no output matrix of its own."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    feed: int
    vocabulary: int
    weights: str
    train_context: int = 131_072
    tied: bool = False
    experts: int = 0
    used: int = 0
    hole: bool = False

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return "qwen3moe" if self.experts else "llama"

    @property
    def kv_per_token(self) -> int:
        """Bytes of F16 keys and values of one token, all layers."""
        return self.layers * 2 * self.kv_heads * self.head * 2


#: Llama 3.2 1B, Llama 3.1 8B, a dense 32B with Qwen's widths, and 16 layers of Qwen3 30B-A3B.
SHAPES: Final = {
    one.name: one
    for one in (
        Shape(name="small-1b", layers=16, width=2048, heads=32, kv_heads=8, head=64, feed=8192, vocabulary=128_256,
            weights="F16", tied=True),
        Shape(name="mid-8b", layers=32, width=4096, heads=32, kv_heads=8, head=128, feed=14_336, vocabulary=128_256,
            weights="Q4_0"),
        Shape(name="large-32b", layers=64, width=5120, heads=40, kv_heads=8, head=128, feed=27_648, vocabulary=152_064,
            weights="Q4_0", hole=True),
        Shape(name="moe", layers=16, width=2048, heads=32, kv_heads=4, head=128, feed=768, vocabulary=151_936,
            weights="Q4_0", experts=128, used=8),
        Shape(name="tiny", layers=2, width=256, heads=4, kv_heads=2, head=64, feed=512, vocabulary=1024, weights="F16",
            train_context=65_536),
    )
}  # fmt: skip


def write_shape(shape: Shape, folder: Path) -> Path:
    """Write the model; returns its path, ``<name>.gguf``."""
    path = folder / f"{shape.name}.gguf"
    tensors = list(_tensors(shape))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields := _metadata(shape))) + b"".join(fields)
    offset, placed = 0, []
    for name, kind, dimensions in tensors:
        number, elements, size = _TYPES[kind]
        total = elements_of(dimensions) // elements * size
        head += _text(name) + struct.pack("<I", len(dimensions)) + struct.pack(f"<{len(dimensions)}Q", *dimensions)
        head += struct.pack("<IQ", number, offset)
        placed.append((offset, kind, total))
        offset += -(-total // ALIGNMENT) * ALIGNMENT
    head += b"\0" * (-len(head) % ALIGNMENT)
    tiles = {kind: tile(kind) for kind in ("F16", "Q4_0", "Q8_0")}
    with path.open("wb") as file:
        file.write(head)
        for start, kind, total in placed:
            file.seek(len(head) + start)
            if kind == "F32":
                file.write(struct.pack("<f", 1.0) * (total // 4))
            elif not shape.hole:
                _repeat(file, tiles[kind], total)
        file.truncate(len(head) + offset)
    return path


def elements_of(dimensions: Sequence[int]) -> int:
    """The product."""
    product = 1
    for one in dimensions:
        product *= one
    return product


def tile(kind: str) -> bytes:
    """About a mebibyte of random weights near 0.02, the same every time."""
    number = random.Random(0)
    if kind == "F16":
        return struct.pack(f"<{_TILE // 2}e", *(number.gauss(0, 0.02) for _ in range(_TILE // 2)))
    _, _, size = _TYPES[kind]
    scale = struct.pack("<e", 0.005 if kind == "Q4_0" else 0.0003)
    return b"".join(scale + number.randbytes(size - 2) for _ in range(_TILE // size))


def _repeat(file: BinaryIO, piece: bytes, total: int) -> None:
    whole, rest = divmod(total, len(piece))
    for _ in range(whole):
        file.write(piece)
    file.write(piece[:rest])


def _tensors(shape: Shape) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and dimensions (the contiguous one first)."""
    kind, width = shape.weights, shape.width
    yield "token_embd.weight", kind, (width, shape.vocabulary)
    yield "output_norm.weight", "F32", (width,)
    if not shape.tied:
        yield "output.weight", kind, (width, shape.vocabulary)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", "F32", (width,)
        yield f"{block}.ffn_norm.weight", "F32", (width,)
        yield f"{block}.attn_q.weight", kind, (width, shape.heads * shape.head)
        yield f"{block}.attn_k.weight", kind, (width, shape.kv_heads * shape.head)
        yield f"{block}.attn_v.weight", kind, (width, shape.kv_heads * shape.head)
        yield f"{block}.attn_output.weight", kind, (shape.heads * shape.head, width)
        if not shape.experts:
            yield f"{block}.ffn_gate.weight", kind, (width, shape.feed)
            yield f"{block}.ffn_up.weight", kind, (width, shape.feed)
            yield f"{block}.ffn_down.weight", kind, (shape.feed, width)
            continue
        yield f"{block}.attn_q_norm.weight", "F32", (shape.head,)
        yield f"{block}.attn_k_norm.weight", "F32", (shape.head,)
        yield f"{block}.ffn_gate_inp.weight", "F32", (width, shape.experts)
        yield f"{block}.ffn_gate_exps.weight", kind, (width, shape.feed, shape.experts)
        yield f"{block}.ffn_up_exps.weight", kind, (width, shape.feed, shape.experts)
        yield f"{block}.ffn_down_exps.weight", kind, (shape.feed, width, shape.experts)


def _metadata(shape: Shape) -> list[bytes]:
    name = shape.architecture
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{value:02X}>" for value in range(256)]
    words = [f"w{number}" for number in range(shape.vocabulary - len(special) - len(octets))]
    kinds = [2, 3, 3, *[6] * len(octets), *[1] * len(words)]
    found = [
        _field("general.architecture", name),
        _field("general.name", shape.name),
        _field("general.file_type", _FILE_TYPES[shape.weights]),
        _field("general.quantization_version", 2),
        _field(f"{name}.context_length", shape.train_context),
        _field(f"{name}.embedding_length", shape.width),
        _field(f"{name}.block_count", shape.layers),
        _field(f"{name}.feed_forward_length", shape.feed * (shape.used or 1)),
        _field(f"{name}.attention.head_count", shape.heads),
        _field(f"{name}.attention.head_count_kv", shape.kv_heads),
        _field(f"{name}.attention.key_length", shape.head),
        _field(f"{name}.attention.value_length", shape.head),
        _field(f"{name}.attention.layer_norm_rms_epsilon", 1e-5),
        _field(f"{name}.rope.dimension_count", shape.head),
        _field(f"{name}.vocab_size", shape.vocabulary),
        _field("tokenizer.ggml.model", "llama"),
        _array("tokenizer.ggml.tokens", _TEXT, b"".join(map(_text, [*special, *octets, *words])), shape.vocabulary),
        _array("tokenizer.ggml.scores", _F32, bytes(4 * shape.vocabulary), shape.vocabulary),
        _array("tokenizer.ggml.token_type", _I32, struct.pack(f"<{shape.vocabulary}i", *kinds), shape.vocabulary),
        _field("tokenizer.ggml.bos_token_id", 1),
        _field("tokenizer.ggml.eos_token_id", 2),
    ]
    if shape.experts:
        found += [
            _field(f"{name}.expert_count", shape.experts),
            _field(f"{name}.expert_used_count", shape.used),
            _field(f"{name}.expert_feed_forward_length", shape.feed),
        ]
    return found


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _field(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, float):
        return _text(key) + struct.pack("<If", _F32, value)
    return _text(key) + struct.pack("<II", _U32, value)


def _array(key: str, kind: int, data: bytes, count: int) -> bytes:
    return _text(key) + struct.pack("<IIQ", _ARRAY, kind, count) + data
