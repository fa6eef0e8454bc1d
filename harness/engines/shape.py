"""What decides a model's caches and compute buffers, read from the header of its GGUF."""

from __future__ import annotations

from typing import Final

from harness.engines.gguf import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH, Header, is_count, numbers
from harness.model.planned import Shape

#: Layers with a window among those of an architecture: of so many, all but the last (llama.cpp src/llama-model.cpp,
#: ``set_swa_pattern``; b11434). Of an architecture that is not here, every layer is taken to see everything.
_PATTERNS: Final = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "gpt-oss": 2, "exaone4": 4, "olmo2": 4, "olmo3": 4, "afmoe": 4,
    "smallthinker": 4,
}  # fmt: skip
_FOUR: Final = 4  # bytes of an f32


def shape_of(header: Header) -> Shape | None:
    """What decides its caches and compute buffers; ``None`` where the header does not say it.

    Source: llama.cpp src/llama-hparams.cpp (``n_embd_k_gqa``, ``n_embd_r``, ``n_embd_s``), src/llama-model.cpp; b11434.
    """
    architecture, layers = header.metadata.get("general.architecture"), header.field("block_count")
    width, train = header.field("embedding_length"), header.field("context_length")
    heads = numbers(header.field("attention.head_count"))
    if not (isinstance(architecture, str) and layers and width and train) or not any(heads):
        return None
    kv_heads = numbers(header.field("attention.head_count_kv")) or heads
    kv_heads = kv_heads * layers if len(kv_heads) == 1 else kv_heads[:layers]
    head = width // max(heads)
    key, value = _one(header, "attention.key_length", head), _one(header, "attention.value_length", head)
    recurrent, state, known = _recurrent(header, kv_heads, width)
    kv_heads = [0 if state_only else count for count, state_only in zip(kv_heads, recurrent, strict=False)]
    window = header.field("attention.sliding_window")
    window = window if is_count(window, MAX_TOKENS) else None
    windowed = _windowed(header, architecture, layers) if window is not None else ()
    latent = header.field("attention.kv_lora_rank")
    if latent is not None and header.field("attention.key_length_mla") is not None:
        value = 0  # values are a part of the keys that are kept (MLA)
    feeds = numbers(header.field("feed_forward_length"))
    expert, used = _one(header, "expert_feed_forward_length", 0), _one(header, "expert_used_count", 0)
    sizes = dict(header.tensors)
    tied = "output.weight" not in sizes
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return Shape(
        architecture=architecture, train_context=train, layers=layers, width=width, heads=max(heads),
        kv_heads=tuple(kv_heads), key_length=key, value_length=value, feed=max([*feeds, expert * used, width]),
        vocabulary=len(tokens) if isinstance(tokens, list) else _one(header, "vocab_size", 262_144), window=window,
        windowed=windowed, recurrent=tuple(recurrent), recurrent_bytes=state,
        known=known and len(kv_heads) == layers and (window is None or bool(windowed)),
        weights_bytes=sum(sizes.values()),
        input_bytes=0 if tied else sizes.get("token_embd.weight", 0),
    )  # fmt: skip


def _one(header: Header, key: str, default: int) -> int:
    value = header.field(key)
    return value if is_count(value, MAX_WIDTH) else default


def _windowed(header: Header, architecture: str, layers: int) -> tuple[bool, ...]:
    pattern = header.field("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) >= layers:
        return tuple(bool(one) for one in pattern[:layers])
    every = pattern if is_count(pattern, MAX_LAYERS) else _PATTERNS.get(architecture)
    return () if every is None else tuple(index % every < every - 1 for index in range(layers))


def _recurrent(header: Header, kv_heads: list[int], width: int) -> tuple[list[bool], int, bool]:
    """Which layers are recurrent alone, the state of one of them (f32, bytes), and whether that is known."""
    inner, state, conv = (header.field(f"ssm.{key}") for key in ("inner_size", "state_size", "conv_kernel"))
    groups = _one(header, "ssm.group_count", 0)
    every = header.field("full_attention_interval")
    if all(is_count(one, MAX_WIDTH) for one in (inner, state, conv)):
        size = ((conv - 1) * (inner + 2 * groups * state) + state * inner) * _FOUR
        if is_count(every, MAX_LAYERS):
            return [(index + 1) % every != 0 for index in range(len(kv_heads))], size, True
        alone = [count == 0 for count in kv_heads]
        return alone, size, any(alone)
    if is_count(cache := header.field("shortconv.l_cache"), MAX_TOKENS):
        return [count == 0 for count in kv_heads], (cache - 1) * width * _FOUR, True
    alone = [count == 0 for count in kv_heads]
    return alone, 0, not any(alone)
