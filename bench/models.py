"""Models of known shape for the benches: a real GGUF header over a sparse file, so that any size costs no disk.

Weights are zeros. Memory does not depend on their values, nor does speed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quant_shape_to_byte_shape

VOCABULARY: Final = 32_000
F16: Final = GGMLQuantizationType.F16
F32: Final = GGMLQuantizationType.F32
Q4_0: Final = GGMLQuantizationType.Q4_0
_DTYPES: Final[dict[Any, Any]] = {F16: numpy.dtype("float16"), F32: numpy.dtype("float32"), Q4_0: numpy.dtype("uint8")}
_ALIGNMENT: Final = 32
#: Name, shape (rows first), type.
Tensor = tuple[str, tuple[int, ...], GGMLQuantizationType]


class Shape:
    """Collects a model's metadata and tensors."""

    def __init__(self, architecture: str, layers: int, width: int, heads: int, kv_heads: int | list[int], head: int, feed: int):
        self.architecture, self.layers, self.width = architecture, layers, width
        self.heads, self.head, self.feed = heads, head, feed
        self.kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
        self.train_context = 131_072
        self.quantized = F16
        self.tensors: list[Tensor] = []
        self.value, self.rope = head, head
        self.more: Callable[[GGUFWriter], Any] = bool

    def add(self, name: str, *shape: int, kind: GGMLQuantizationType | None = None) -> None:
        """One tensor; matrices in the model's type, vectors as F32."""
        if kind is None:
            kind = self.quantized if len(shape) > 1 else F32
        self.tensors.append((name, shape, kind))

    def ends(self, *, tied: bool = True) -> None:
        """Embeddings and output."""
        self.add("token_embd.weight", VOCABULARY, self.width)
        self.add("output_norm.weight", self.width)
        if not tied:
            self.add("output.weight", VOCABULARY, self.width)

    def attention(self, layer: int, *, bias: bool = False, norms: bool = False) -> None:
        """Queries, keys, values and their output."""
        block, kv = f"blk.{layer}.", self.kv_heads[layer] * self.head
        rows = {"attn_q": self.heads * self.head, "attn_k": kv, "attn_v": kv}
        for name, size in rows.items():
            self.add(f"{block}{name}.weight", size, self.width)
            if bias:
                self.add(f"{block}{name}.bias", size)
        self.add(f"{block}attn_output.weight", self.width, self.heads * self.head)
        if norms:
            self.add(f"{block}attn_q_norm.weight", self.head)
            self.add(f"{block}attn_k_norm.weight", self.head)

    def norms(self, layer: int, *names: str) -> None:
        """Norms of a layer."""
        for name in ("attn_norm", "ffn_norm", *names):
            self.add(f"blk.{layer}.{name}.weight", self.width)

    def dense(self, layer: int) -> None:
        """A gated feed-forward."""
        for name in ("ffn_gate", "ffn_up"):
            self.add(f"blk.{layer}.{name}.weight", self.feed, self.width)
        self.add(f"blk.{layer}.ffn_down.weight", self.width, self.feed)

    def experts(self, layer: int, count: int, feed: int) -> None:
        """A router and its experts."""
        self.add(f"blk.{layer}.ffn_gate_inp.weight", count, self.width, kind=F32)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            self.add(f"blk.{layer}.{name}.weight", count, feed, self.width)
        self.add(f"blk.{layer}.ffn_down_exps.weight", count, self.width, feed)

    def write(self, path: Path) -> Path:
        """Write the header, and the tensors as one hole."""
        writer = GGUFWriter(path, self.architecture)
        writer.add_name(path.stem)
        writer.add_context_length(self.train_context)
        writer.add_embedding_length(self.width)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self.feed)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads if len(set(self.kv_heads)) > 1 else self.kv_heads[0])
        writer.add_key_length(self.head)
        writer.add_value_length(self.value)
        writer.add_rope_dimension_count(self.rope)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(1e6)
        writer.add_vocab_size(VOCABULARY)
        writer.add_file_type(2 if self.quantized == Q4_0 else 1)
        self.more(writer)
        _tokens(writer)
        for name, shape, kind in self.tensors:
            stored = quant_shape_to_byte_shape(shape, kind) if kind == Q4_0 else shape
            width = {F16: 2, F32: 4}.get(kind, 1)
            writer.add_tensor_info(name, stored, _DTYPES[kind], prod(stored) * width, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out: Any = writer.fout[0] if writer.fout else None
        sizes = [info.nbytes for info in writer.tensors[0].values()]
        out.truncate(sum(_padded(size) for size in (out.tell(), *sizes)))
        writer.close()
        return path


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _tokens(writer: GGUFWriter) -> None:
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{value:02X}>" for value in range(256)]
    words = [f"w{number}" for number in range(VOCABULARY - len(special) - len(octets))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *octets, *words])
    writer.add_token_scores([0.0] * VOCABULARY)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_token_types([*kinds, *[TokenType.BYTE] * len(octets), *[TokenType.NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def qwen2() -> Shape:
    """Dense, grouped queries, tied output, F16: 24 layers."""
    shape = Shape("qwen2", layers=24, width=896, heads=14, kv_heads=2, head=64, feed=4864)
    shape.ends()
    for layer in range(shape.layers):
        shape.norms(layer)
        shape.attention(layer, bias=True)
        shape.dense(layer)
    return shape


def llama(feed: int = 8192) -> Shape:
    """Dense, an output matrix of its own, Q4_0: 16 layers."""
    shape = Shape("llama", layers=16, width=2048, heads=32, kv_heads=8, head=64, feed=feed)
    shape.quantized = Q4_0
    shape.ends(tied=False)
    for layer in range(shape.layers):
        shape.norms(layer)
        shape.attention(layer)
        shape.dense(layer)
    return shape


def gemma3() -> Shape:
    """Five of six layers see a window of 512 tokens: 26 layers."""
    shape = Shape("gemma3", layers=26, width=1152, heads=4, kv_heads=1, head=256, feed=6912)
    shape.more = lambda writer: writer.add_sliding_window(512)
    shape.ends()
    for layer in range(shape.layers):
        shape.norms(layer, "post_attention_norm", "post_ffw_norm")
        shape.attention(layer, norms=True)
        shape.dense(layer)
    return shape


def lfm2() -> Shape:
    """Hybrid: attention in 6 of 16 layers, short convolutions in the others."""
    attending = {2, 5, 8, 10, 12, 14}
    cache = [8 if layer in attending else 0 for layer in range(16)]
    shape = Shape("lfm2", layers=16, width=1024, heads=16, kv_heads=cache, head=64, feed=4608)
    shape.more = lambda writer: writer.add_shortconv_l_cache(3)
    shape.add("token_embd.weight", VOCABULARY, shape.width)
    shape.add("token_embd_norm.weight", shape.width)
    for layer in range(shape.layers):
        shape.norms(layer)
        if layer in attending:
            shape.attention(layer, norms=True)
        else:
            shape.add(f"blk.{layer}.shortconv.conv.weight", shape.width, 3, kind=F32)
            shape.add(f"blk.{layer}.shortconv.in_proj.weight", 3 * shape.width, shape.width)
            shape.add(f"blk.{layer}.shortconv.out_proj.weight", shape.width, shape.width)
        shape.dense(layer)
    return shape


def qwen3moe(expert_feed: int = 768) -> Shape:
    """8 experts, 2 of them used, in every layer; heads wider than ``width / heads``."""
    shape = Shape("qwen3moe", layers=12, width=1024, heads=16, kv_heads=4, head=128, feed=3072)

    def more(writer: GGUFWriter) -> None:
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(expert_feed)

    shape.more = more
    shape.ends()
    for layer in range(shape.layers):
        shape.norms(layer)
        shape.attention(layer, norms=True)
        shape.experts(layer, 8, expert_feed)
    return shape


def deepseek2() -> Shape:
    """Latent attention without the absorbed cache, one dense layer before 9 with 16 experts and a shared one."""
    shape = Shape("deepseek2", layers=10, width=1024, heads=8, kv_heads=8, head=192, feed=2816)
    rank, rope, plain, value = 512, 64, 128, 128

    def more(writer: GGUFWriter) -> None:
        writer.add_expert_count(16)
        writer.add_expert_used_count(4)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(512)
        writer.add_expert_weights_scale(1.0)
        writer.add_leading_dense_block_count(1)
        writer.add_q_lora_rank(rank)
        writer.add_kv_lora_rank(rank)

    shape.more, shape.value, shape.rope = more, value, rope
    shape.ends(tied=False)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        shape.norms(layer)
        shape.add(f"{block}attn_q_a.weight", rank, shape.width)
        shape.add(f"{block}attn_q_a_norm.weight", rank)
        shape.add(f"{block}attn_q_b.weight", shape.heads * shape.head, rank)
        shape.add(f"{block}attn_kv_a_mqa.weight", rank + rope, shape.width)
        shape.add(f"{block}attn_kv_a_norm.weight", rank)
        shape.add(f"{block}attn_kv_b.weight", shape.heads * (plain + value), rank)
        shape.add(f"{block}attn_output.weight", shape.width, shape.heads * value)
        if layer == 0:
            shape.dense(layer)
            continue
        shape.experts(layer, 16, 512)
        for name, size in (("ffn_gate_shexp", (512, shape.width)), ("ffn_up_shexp", (512, shape.width)),
                           ("ffn_down_shexp", (shape.width, 512))):  # fmt: skip
            shape.add(f"{block}{name}.weight", *size)
    return shape


MODELS: Final[dict[str, Callable[[], Shape]]] = {
    "qwen2": qwen2, "llama": llama, "gemma3": gemma3, "lfm2": lfm2, "qwen3moe": qwen3moe, "deepseek2": deepseek2,
}  # fmt: skip
