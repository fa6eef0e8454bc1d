"""Types of KV caches: the bytes of one value, by ggml's block sizes. A new type's size goes here."""

from __future__ import annotations

from typing import Final

#: Bytes of one value of a KV cache, by ggml type: block bytes over values in a block (ggml ``ggml-common.h``).
VALUE_BYTES: Final[dict[str, float]] = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
#: Types of a cache that only flash attention reads (llama.cpp ``llama_init_from_model``: "V cache quantization requires").
QUANTIZED: Final = frozenset(VALUE_BYTES) - {"f32", "f16", "bf16"}
