"""What a load would take by arithmetic from the header, where no engine can plan it: with a bound that is wide on purpose.

Caches follow llama.cpp's own (src/llama-kv-cache.cpp): keys and values of each layer that keeps them, in whole blocks of the
cache's type; windows hold the window and one batch; recurrent state is f32. Compute buffers are 2·u bytes a token of masks with
flash attention and 4·(heads+1)·u of scores without, u the physical batch, beside a part for activations that was fitted to
seven architectures (docs/explanation/estimates.md), and the f16 copies of one layer through which flash attention reads an f32
cache (``llm_graph_context::build_attn_mha``, src/llama-graph.cpp).
"""

from __future__ import annotations

from typing import Final

from harness.errors import UntrustedError
from harness.model.facts import CacheFacts
from harness.model.kv_types import QUANTIZED, VALUE_BYTES
from harness.model.planned import PlannedLoad, Shape
from harness.units import pad_cells

#: Doubt of each part, relative: that of activations is large, and they are small in large models.
CACHE_DOUBT: Final = 0.03
COMPUTE_DOUBT: Final = 0.5
WEIGHTS_DOUBT: Final = 0.01
#: Doubt of the caches of an architecture that is known in part; every layer was taken to see everything.
UNKNOWN_DOUBT: Final = 0.25
_F32: Final = 4


def plan_by_formula(
    shape: Shape, context: int, num_batch: int, slots: int, cache_type: str, flash_attention: str | None
) -> PlannedLoad:
    """One load at ``context`` tokens per slot.

    Raises:
        UntrustedError: a cache type whose blocks are not known.
    """
    if cache_type not in VALUE_BYTES:
        raise UntrustedError(f"the size of a KV cache of type {cache_type} is not known", code="no-estimate")
    flash = flash_attention or "enabled"
    if cache_type in QUANTIZED and flash_attention is None:
        flash = "enabled"
    cells = pad_cells(context)
    each = (shape.key_length + shape.value_length) * VALUE_BYTES[cache_type]
    windowed = shape.windowed or (False,) * shape.layers
    full = sum(count for count, is_window in zip(shape.kv_heads, windowed, strict=False) if not is_window)
    windows = sum(count for count, is_window in zip(shape.kv_heads, windowed, strict=False) if is_window)
    caches = [_cache("full", cells, slots, full * each)] if full else []
    window_cells = 0
    if windows and shape.window is not None:
        window_cells = min(pad_cells(shape.window + num_batch), cells)
        caches.append(_cache("window", window_cells, slots, windows * each))
    batch = min(num_batch, cells)
    activations = batch * _F32 * 4 * (shape.width + max(shape.width, shape.heads * shape.key_length, shape.feed))
    masks = 2 * batch * (cells + window_cells) if flash == "enabled" else 4 * batch * (shape.heads + 1) * cells
    copies = 0
    if flash == "enabled" and cache_type == "f32":
        of_layers = (
            count * (window_cells if is_window else cells) for count, is_window in zip(shape.kv_heads, windowed, strict=False)
        )
        copies = slots * round(max(of_layers, default=0) * each / 2)
    return PlannedLoad(
        caches=tuple(caches),
        recurrent_bytes=sum(shape.recurrent) * shape.recurrent_bytes * slots,
        compute_bytes=activations + masks + copies + shape.vocabulary * _F32,
        kv_cache_type=cache_type,
        flash_attention="disabled" if flash == "disabled" else "enabled",
    )


def _cache(role: str, cells: int, slots: int, per_cell: float) -> CacheFacts:
    return CacheFacts(
        cells=cells, streams=slots, role="window" if role == "window" else "full",
        devices={"CPU": round(per_cell * cells * slots)},
    )  # fmt: skip
