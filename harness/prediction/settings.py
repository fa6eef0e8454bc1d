"""What a calibration says of other settings than it was made with: derived where the arithmetic is exact, else nothing.

Settings are part of a calibration's identity. The KV cache is an array of blocks, so another type changes it by the ratio of
block sizes (ggml ``ggml-common.h``, ``block_q8_0`` and others); recurrent state is f32 whatever the type. Slots multiply the
caches. Flash attention changes the compute buffers by an amount that only a measurement tells, and reads an f32 cache through
f16 copies, hidden below other buffers up to some context (embedded b11549, 65 536 tokens: 28 MiB more than the blocks).
"""

from __future__ import annotations

from typing import Final

import msgspec

from harness.model.calibration import SHARED_CACHE, Band, Calibration
from harness.model.kv_types import QUANTIZED, VALUE_BYTES
from harness.prediction.memory import is_cast
from harness.text import counted
from harness.units import GIB, TOKENS_PER_UNIT

#: The heap of a process with another type of cache (deepseek2, q8_0 instead of f16, b11434: 1.3 MiB more).
_HEAP_GB: Final = 2 / 1024
#: A cache that is quantised has the graph turn keys and queries (Hadamard): compute holds a batch of them more. cohere2 over an
#: rpc device, b11434, q8_0 instead of f16: 1.06 times width · u · 4 bytes. Where no width is known, that of 70B models counts.
_TURNED: Final = 2.0
_WIDTH: Final = 8192
#: What a log calls a cache of the model's own type, which is asked for as ``auto``.
_OF_THE_MODEL: Final = ("bfloat16", "float16")


class AskedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a question; ``None`` is what the calibration has. ``kv_cache_type`` is one type, or ``K/V``.

    ``placed``: where layers go was asked for.
    """

    kv_cache_type: str | None = None
    flash_attention: str | None = None
    num_batch: int | None = None
    num_parallel: int | None = None
    placed: bool | None = None


class Derivation(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration as it holds for asked settings.

    ``derived`` says what was calculated instead of measured, ``obstacles`` what differs and cannot be calculated; with an
    obstacle the calibration answers nothing.
    """

    calibration: Calibration
    derived: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()


def derive(calibration: Calibration, asked: AskedSettings, *, ggml_caches: bool = True) -> Derivation:
    """The calibration at the settings that are asked for.

    Args:
        calibration: as measured.
        asked: what differs.
        ggml_caches: whether the engine's KV caches are arrays of ggml blocks, so that their type can be exchanged.
    """
    own = calibration.metadata.settings
    obstacles: list[str] = []
    derived: list[str] = []
    flash: str | None = own.flash_attention
    if asked.flash_attention not in (None, flash):
        obstacles.append(f"flash attention {flash or 'as the engine chose'}, not {asked.flash_attention}")
        flash = asked.flash_attention
    batches = {band.num_batch for band in calibration.metadata.bands}
    if asked.num_batch is not None and asked.num_batch not in batches:
        measured = ", ".join(f"{batch:,}" for batch in sorted(batch for batch in batches if batch is not None)) or "unknown"
        obstacles.append(f"physical batch {measured}, not {asked.num_batch:,}")
    elif asked.num_batch is not None and len(batches) > 1:
        calibration, beyond = at_batch(calibration, asked.num_batch)
        if beyond is not None:
            derived.append(f"physical batch {asked.num_batch:,} beyond {beyond:,} tokens, by its straight line")
    shared = any(SHARED_CACHE in note for note in calibration.metadata.quality.notes)
    if ggml_caches and shared and asked.num_parallel not in (None, own.num_parallel):
        obstacles.append(f"one cache for {counted(own.num_parallel, 'slot')}, not {counted(asked.num_parallel or 1, 'slot')}")
    elif ggml_caches and is_cast(calibration) and asked.num_parallel not in (None, own.num_parallel):
        slots = f"{counted(own.num_parallel, 'slot')}, not {counted(asked.num_parallel or 1, 'slot')}"
        obstacles.append(f"{slots}: flash attention copies an f32 cache to f16 for each, and that was not measured")
    wanted, made = _types(asked.kv_cache_type), _types(own.kv_cache_type)
    same = (None, own.kv_cache_type, *(("auto",) if own.kv_cache_type in _OF_THE_MODEL and not ggml_caches else ()))
    differs = asked.kv_cache_type not in same and (wanted is None or wanted != made)
    if differs:
        name = f"KV cache {own.kv_cache_type}, not {asked.kv_cache_type}"
        scaled = _with_cache(calibration, made, wanted) if ggml_caches and made is not None and wanted is not None else None
        if scaled is None or wanted is None:
            obstacles.append(name)
        elif flash != "enabled" and wanted[1] in QUANTIZED:
            obstacles.append(f"{name}, which needs flash attention")
        elif flash != "disabled" and "f32" in (*wanted, *(made or ())):
            obstacles.append(f"{name}: flash attention copies such a cache to f16, and what the copies take was not measured")
        else:
            calibration = scaled
            derived.append(f"KV cache {asked.kv_cache_type} from {own.kv_cache_type}, by the sizes of their blocks")
    return Derivation(calibration=calibration, derived=tuple(derived), obstacles=tuple(obstacles))


def at_batch(calibration: Calibration, batch: int) -> tuple[Calibration, int | None]:
    """A calibration whose engine is given one of the measured batches at every context.

    With flash attention memory is a straight line in the context whatever the batch, so the line holds to the end of the
    calibrated range; the second value is where its own band ended, ``None`` where it is not exceeded. Without, it ends there.
    """
    metadata = calibration.metadata
    own = [band for band in metadata.bands if band.num_batch == batch]
    last, top = own[-1], metadata.quality.valid_to
    line = metadata.settings.flash_attention == "enabled"
    end = top if line else min(last.up_to, top)
    bands = (*own[:-1], msgspec.structs.replace(last, up_to=end))
    overhead = metadata.breakdown_gb.overhead if last.overhead_gb is None else last.overhead_gb
    parts = metadata.breakdown_gb
    if parts.weights is not None and last.fixed_cache_gb is not None:
        compute = last.base_vram_gb - parts.weights - last.fixed_cache_gb - (overhead or 0.0)
        parts = msgspec.structs.replace(parts, fixed_cache=last.fixed_cache_gb, overhead=overhead, compute=compute)
    changed = msgspec.structs.replace(
        metadata,
        bands=bands,
        breakdown_gb=parts,
        settings=msgspec.structs.replace(metadata.settings, num_batch=batch),
        quality=msgspec.structs.replace(metadata.quality, valid_to=end),
    )
    constants = msgspec.structs.replace(
        calibration.constants,
        base_vram_gb=last.base_vram_gb,
        kv_cache_gb_per_10k=last.kv_cache_gb_per_10k,
        compute_gb_per_10k=last.compute_gb_per_10k,
    )
    fixed = msgspec.structs.replace(calibration, constants=constants, metadata=changed)
    return fixed, last.up_to if last.up_to < end else None


def _types(text: str | None) -> tuple[str, str] | None:
    """Types of K and V; ``None`` where one is not a ggml type (``auto``, vLLM's)."""
    if text is None:
        return None
    key, _, value = text.partition("/")
    found = (key, value or key)
    return found if all(one in VALUE_BYTES for one in found) else None


def _with_cache(calibration: Calibration, made: tuple[str, str], wanted: tuple[str, str]) -> Calibration | None:
    """The same with caches of another type; ``None`` where what they hold is not known well enough.

    K and V may have values of different sizes (MLA), so a type each can only be exchanged where both have one.
    """
    if made[0] != made[1] or wanted[0] != wanted[1]:
        return None
    ratio = VALUE_BYTES[wanted[0]] / VALUE_BYTES[made[0]]
    metadata = calibration.metadata
    kinds = metadata.placement.layer_kinds
    if metadata.breakdown_gb.weights is None or any(band.fixed_cache_gb is None for band in metadata.bands):
        return None  # the parts are unknown, so the cache is no slope of its own
    fixed = any(band.fixed_cache_gb for band in metadata.bands)
    if fixed and kinds is None:
        return None
    window = any(kind in "w" for kind in kinds or "")
    recurrent = any(kind in "rb" for kind in kinds or "")
    if fixed and window and recurrent:
        return None
    fixed_ratio = 1.0 if recurrent else ratio
    copies = (wanted[0] != "f16") - (made[0] != "f16")
    if metadata.machine.meter != "nvml" or metadata.settings.flash_attention == "disabled":
        copies = 0

    def scaled(band: Band) -> Band:
        own = band.fixed_cache_gb or 0.0
        fixed_cache = own * fixed_ratio
        more = copies * _layer_f16_gb(calibration, made[0])
        if band.compute_gb_per_10k + more < _mask_gb(band):  # too little to hold such copies: an engine that reserved none
            more = max(more, 0.0)
        return msgspec.structs.replace(
            band,
            kv_cache_gb_per_10k=band.kv_cache_gb_per_10k * ratio,
            compute_gb_per_10k=band.compute_gb_per_10k + more,
            fixed_cache_gb=fixed_cache,
            base_vram_gb=band.base_vram_gb + fixed_cache - own,
        )

    bands = tuple(scaled(band) for band in metadata.bands)
    last = bands[-1]
    settings = msgspec.structs.replace(metadata.settings, kv_cache_type=wanted[0])
    parts = metadata.breakdown_gb
    breakdown = msgspec.structs.replace(parts, fixed_cache=(parts.fixed_cache or 0.0) * fixed_ratio)
    constants = msgspec.structs.replace(
        calibration.constants,
        base_vram_gb=last.base_vram_gb,
        kv_cache_gb_per_10k=last.kv_cache_gb_per_10k,
        compute_gb_per_10k=last.compute_gb_per_10k,
    )
    placement = msgspec.structs.replace(metadata.placement, set_compute=())  # dry runs of the other caches
    spread = metadata.quality.overhead_spread_gb or 0.0
    if metadata.machine.meter == "host":
        spread = max(spread, _HEAP_GB)
    if (wanted[0] in QUANTIZED) != (made[0] in QUANTIZED):
        batch = max(band.num_batch or 0 for band in metadata.bands)
        spread += _TURNED * (metadata.placement.width or _WIDTH) * batch * 4 / GIB
    quality = msgspec.structs.replace(metadata.quality, overhead_spread_gb=spread or None)
    metadata = msgspec.structs.replace(
        metadata, bands=bands, settings=settings, breakdown_gb=breakdown, placement=placement, quality=quality,
        performance=metadata.performance.untimed,
    )  # fmt: skip
    return msgspec.structs.replace(calibration, constants=constants, metadata=metadata)


def _layer_f16_gb(calibration: Calibration, made: str) -> float:
    """GiB per 10 000 tokens of the keys and values of one layer in f16.

    CUDA's flash attention reads a cache of any other type through such a copy, reserved with the compute buffers (llama.cpp
    #23907; ggml-cuda ``fattn-common.cuh``, ``ggml_cuda_flash_attn_ext_get_f16_extra_data``: ``K->type != GGML_TYPE_F16``).
    """
    kinds = calibration.metadata.placement.layer_kinds or ""
    layers = sum(kind in "fb" for kind in kinds) or calibration.metadata.model.layers or 1
    return calibration.constants.kv_cache_gb_per_10k / layers * VALUE_BYTES["f16"] / VALUE_BYTES[made]


def _mask_gb(band: Band) -> float:
    """GiB per 10 000 tokens of the mask of flash attention, f16, which compute buffers hold at least."""
    return (band.num_batch or 0) * VALUE_BYTES["f16"] * TOKENS_PER_UNIT / GIB * 0.99
