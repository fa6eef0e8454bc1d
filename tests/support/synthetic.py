"""Models of a few megabytes with the shapes that decide memory: random weights, realistic heads, a tokenizer of bytes.

Tensor names and metadata keys: gguf-py (constants.py) of llama.cpp b10434. Each model has few layers and a small feed-forward
part, so that a load takes a second; the caches and compute buffers of attention are those of real models per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

_VOCABULARY: Final = 1024
_F16: Final = 1


class _Writer:
    """A GGUF being written: metadata that every decoder has, then tensors of random weights."""

    def __init__(self, path: Path, architecture: str, train_context: int) -> None:
        import numpy
        from gguf import GGUFWriter

        self._numpy: Any = numpy
        self._random = numpy.random.default_rng(0)
        self.gguf: Any = GGUFWriter(path, architecture)
        self.gguf.add_name(path.stem)
        self.gguf.add_context_length(train_context)
        self.gguf.add_layer_norm_rms_eps(1e-6)
        self.gguf.add_rope_freq_base(1e6)
        self.gguf.add_file_type(_F16)
        self._tokenizer()

    def _tokenizer(self) -> None:
        from gguf import TokenType

        special = ["<unk>", "<s>", "</s>"]
        octets = [f"<0x{value:02X}>" for value in range(256)]
        words = [f"w{number}" for number in range(_VOCABULARY - len(special) - len(octets))]
        self.gguf.add_tokenizer_model("llama")
        self.gguf.add_token_list([*special, *octets, *words])
        self.gguf.add_token_scores([0.0] * _VOCABULARY)
        kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        self.gguf.add_token_types([*kinds, *[TokenType.BYTE] * len(octets), *[TokenType.NORMAL] * len(words)])
        self.gguf.add_bos_token_id(1)
        self.gguf.add_eos_token_id(2)
        self.gguf.add_vocab_size(_VOCABULARY)

    def shape(self, *, layers: int, width: int, heads: int, kv_heads: int | Sequence[int], head: int, feed: int) -> None:
        self.gguf.add_block_count(layers)
        self.gguf.add_embedding_length(width)
        self.gguf.add_head_count(heads)
        self.gguf.add_head_count_kv(kv_heads if isinstance(kv_heads, int) else list(kv_heads))
        self.gguf.add_key_length(head)
        self.gguf.add_value_length(head)
        self.gguf.add_rope_dimension_count(head)
        self.gguf.add_feed_forward_length(feed)

    def matrix(self, name: str, *shape: int) -> None:
        data = self._random.standard_normal(shape, dtype=self._numpy.float32) * 0.02
        self.gguf.add_tensor(f"{name}.weight", data.astype(self._numpy.float16))

    def vector(self, name: str, *shape: int, value: float = 1.0, suffix: str = "weight") -> None:
        self.gguf.add_tensor(f"{name}.{suffix}", self._numpy.full(shape, value, self._numpy.float32))

    def norms(self, block: str, width: int) -> None:
        self.vector(f"{block}.attn_norm", width)
        self.vector(f"{block}.ffn_norm", width)

    def attention(self, block: str, width: int, heads: int, kv_heads: int, head: int) -> None:
        self.matrix(f"{block}.attn_q", heads * head, width)
        self.matrix(f"{block}.attn_k", kv_heads * head, width)
        self.matrix(f"{block}.attn_v", kv_heads * head, width)
        self.matrix(f"{block}.attn_output", width, heads * head)

    def feed_forward(self, block: str, width: int, feed: int) -> None:
        self.matrix(f"{block}.ffn_gate", feed, width)
        self.matrix(f"{block}.ffn_up", feed, width)
        self.matrix(f"{block}.ffn_down", width, feed)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def dense(path: Path, train_context: int = 131_072) -> None:
    """``qwen2``: grouped queries, 14 heads on 2 KV heads, tied output."""
    layers, width, heads, kv_heads, head, feed = 4, 896, 14, 2, 64, 1024
    w = _Writer(path, "qwen2", train_context)
    w.shape(layers=layers, width=width, heads=heads, kv_heads=kv_heads, head=head, feed=feed)
    w.matrix("token_embd", _VOCABULARY, width)
    w.vector("output_norm", width)
    for layer in range(layers):
        block = f"blk.{layer}"
        w.norms(block, width)
        w.attention(block, width, heads, kv_heads, head)
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            w.vector(f"{block}.attn_{part}", rows * head, value=0.0, suffix="bias")
        w.feed_forward(block, width, feed)
    w.close()


def many_heads(path: Path, train_context: int = 65_536) -> None:
    """``llama``: 32 heads with keys and values of their own, an output matrix of its own."""
    layers, heads, head, feed = 2, 32, 64, 1024
    width = heads * head
    w = _Writer(path, "llama", train_context)
    w.shape(layers=layers, width=width, heads=heads, kv_heads=heads, head=head, feed=feed)
    w.matrix("token_embd", _VOCABULARY, width)
    w.vector("output_norm", width)
    w.matrix("output", _VOCABULARY, width)
    for layer in range(layers):
        block = f"blk.{layer}"
        w.norms(block, width)
        w.attention(block, width, heads, heads, head)
        w.feed_forward(block, width, feed)
    w.close()


def moe(path: Path, train_context: int = 131_072) -> None:
    """``qwen3moe``: 16 experts, 4 of them used; heads wider than ``width / heads``."""
    layers, width, heads, kv_heads, head, experts, feed = 3, 512, 16, 4, 128, 16, 256
    w = _Writer(path, "qwen3moe", train_context)
    w.shape(layers=layers, width=width, heads=heads, kv_heads=kv_heads, head=head, feed=4 * feed)
    w.gguf.add_expert_count(experts)
    w.gguf.add_expert_used_count(4)
    w.gguf.add_expert_feed_forward_length(feed)
    w.matrix("token_embd", _VOCABULARY, width)
    w.vector("output_norm", width)
    for layer in range(layers):
        block = f"blk.{layer}"
        w.norms(block, width)
        w.attention(block, width, heads, kv_heads, head)
        w.vector(f"{block}.attn_q_norm", head)
        w.vector(f"{block}.attn_k_norm", head)
        w.vector(f"{block}.ffn_gate_inp", experts, width, value=0.01)
        w.matrix(f"{block}.ffn_gate_exps", experts, feed, width)
        w.matrix(f"{block}.ffn_up_exps", experts, feed, width)
        w.matrix(f"{block}.ffn_down_exps", experts, width, feed)
    w.close()


def hybrid(path: Path, train_context: int = 131_072) -> None:
    """``lfm2``: two layers of attention between four of short convolutions, whose state does not grow."""
    layers, width, heads, kv_heads, head, feed = 6, 1024, 16, 8, 64, 1024
    attending = {2, 5}
    w = _Writer(path, "lfm2", train_context)
    w.shape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=[kv_heads if layer in attending else 0 for layer in range(layers)],
        head=head,
        feed=feed,
    )
    w.gguf.add_shortconv_l_cache(3)
    w.matrix("token_embd", _VOCABULARY, width)
    w.vector("token_embd_norm", width)
    for layer in range(layers):
        block = f"blk.{layer}"
        w.norms(block, width)
        if layer in attending:
            w.attention(block, width, heads, kv_heads, head)
            w.vector(f"{block}.attn_q_norm", head)
            w.vector(f"{block}.attn_k_norm", head)
        else:
            w.vector(f"{block}.shortconv.conv", width, 3, value=0.1)
            w.matrix(f"{block}.shortconv.in_proj", 3 * width, width)
            w.matrix(f"{block}.shortconv.out_proj", width, width)
        w.feed_forward(block, width, feed)
    w.close()


def window(path: Path, train_context: int = 131_072) -> None:
    """``cohere2``: three of four layers see 4 096 tokens, the fourth sees everything."""
    layers, width, heads, kv_heads, head, feed = 4, 1024, 16, 4, 64, 1024
    w = _Writer(path, "cohere2", train_context)
    w.shape(layers=layers, width=width, heads=heads, kv_heads=kv_heads, head=head, feed=feed)
    w.gguf.add_layer_norm_eps(1e-5)
    w.gguf.add_sliding_window(4096)
    w.gguf.add_logit_scale(0.25)
    w.matrix("token_embd", _VOCABULARY, width)
    w.vector("output_norm", width)
    for layer in range(layers):
        block = f"blk.{layer}"
        w.vector(f"{block}.attn_norm", width)
        w.attention(block, width, heads, kv_heads, head)
        w.feed_forward(block, width, feed)
    w.close()


#: Name and writer of every model.
MODELS: Final[dict[str, Callable[[Path], None]]] = {
    "dense": dense,
    "many-heads": many_heads,
    "moe": moe,
    "hybrid": hybrid,
    "window": window,
}
#: Training lengths. More heads than 16 without flash attention need more compute at 131,072 tokens than this machine can lend.
TRAIN_CONTEXTS: Final = {"dense": 131_072, "many-heads": 65_536, "moe": 131_072, "hybrid": 131_072, "window": 131_072}
