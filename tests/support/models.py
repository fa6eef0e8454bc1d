"""A model of a few megabytes that real engines load: random weights, a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_LAYERS: Final = 2
_HEADS: Final = 4
_KV_HEADS: Final = 2
_HEAD: Final = 64
_WIDTH: Final = _HEADS * _HEAD
_FEED: Final = 512
_VOCABULARY: Final = 1024
#: Bytes of KV cache per token: keys and values of every layer, as F16.
KV_PER_TOKEN: Final = _LAYERS * 2 * _KV_HEADS * _HEAD * 2


def write_tiny_llama(path: Path, train_context: int = 65_536) -> Path:
    """Write an F16 GGUF of the architecture ``llama``."""
    import numpy
    from gguf import GGUFWriter, TokenType

    random = numpy.random.default_rng(0)

    def weights(*shape: int) -> numpy.ndarray:
        return (random.standard_normal(shape) * 0.02).astype(numpy.float16)

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(train_context)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_HEAD)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_file_type(1)
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{value:02X}>" for value in range(256)]
    words = [f"w{number}" for number in range(_VOCABULARY - len(special) - len(octets))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *octets, *words])
    writer.add_token_scores([0.0] * _VOCABULARY)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_token_types([*kinds, *[TokenType.BYTE] * len(octets), *[TokenType.NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", weights(_VOCABULARY, _WIDTH))
    writer.add_tensor("output_norm.weight", numpy.ones(_WIDTH, numpy.float32))
    output = weights(_VOCABULARY, _WIDTH)
    output[: len(special) + len(octets)] = 0  # it writes words, not the end of the text or bytes that are no text
    writer.add_tensor("output.weight", output)
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", numpy.ones(_WIDTH, numpy.float32))
        for name, rows in (("attn_q", _WIDTH), ("attn_k", _KV_HEADS * _HEAD), ("attn_v", _KV_HEADS * _HEAD)):
            writer.add_tensor(f"{block}.{name}.weight", weights(rows, _WIDTH))
        writer.add_tensor(f"{block}.attn_output.weight", weights(_WIDTH, _WIDTH))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"{block}.{name}.weight", weights(_FEED, _WIDTH))
        writer.add_tensor(f"{block}.ffn_down.weight", weights(_WIDTH, _FEED))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
