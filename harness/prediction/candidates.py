"""Settings of one model whose memory is known: those that were measured, and those that follow exactly from them.

Nothing is interpolated: a KV cache type is measured or derived by the sizes of its blocks (:mod:`harness.prediction.settings`),
a physical batch is one of those that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from harness.model.calibration import Calibration
from harness.model.kv_types import VALUE_BYTES
from harness.prediction.rules import Rules
from harness.prediction.settings import AskedSettings, derive

#: KV cache types that are tried beside the measured ones, where their sizes follow from them.
CACHES: Final = ("f16", "q8_0", "q4_0")


class Candidate(NamedTuple):
    """A calibration as it holds for one choice of cache and batch; ``key`` names its file."""

    key: str
    calibration: Calibration
    derived: tuple[str, ...]
    cache: str
    batch: int | None


def candidates(files: Sequence[tuple[str, Calibration]], asked: AskedSettings, rules: Rules) -> Iterator[Candidate]:
    """What some files of one model, engine and machine say of themselves and of settings that follow from theirs.

    The first file answers without tuning. ``asked`` are settings that are given.
    """
    seen: set[tuple[object, ...]] = set()
    for key, calibration in files:  # what was measured comes before what is derived
        yield from _batches(key, calibration, (), asked, seen)
    for key, calibration in files:
        own = calibration.metadata.settings.kv_cache_type
        for cache in CACHES if own in VALUE_BYTES else ():
            if VALUE_BYTES[cache] >= VALUE_BYTES[own] or asked.kv_cache_type not in (None, cache):
                continue
            at = derive(calibration, AskedSettings(kv_cache_type=cache), ggml_caches=rules.ggml_caches)
            if not at.obstacles:
                yield from _batches(key, at.calibration, at.derived, asked, seen)


def _batches(
    key: str, calibration: Calibration, derived: tuple[str, ...], asked: AskedSettings, seen: set[tuple[object, ...]]
) -> Iterator[Candidate]:
    settings = calibration.metadata.settings
    if asked.kv_cache_type not in (None, settings.kv_cache_type) or asked.flash_attention not in (
        None,
        settings.flash_attention,
    ):
        return
    measured = sorted({band.num_batch for band in calibration.metadata.bands if band.num_batch is not None}, reverse=True)
    several = len(measured) > 1
    for batch in (*((None,) if asked.num_batch is None else ()), *(measured if several else ())):
        identity = (settings.kv_cache_type, settings.flash_attention, batch or (None if several else tuple(measured)))
        if identity in seen or (batch is not None and asked.num_batch not in (None, batch)):
            continue
        seen.add(identity)
        if batch is None:
            yield Candidate(key, calibration, derived, settings.kv_cache_type, None if several else next(iter(measured), None))
        else:
            fixed, beyond = at_batch(calibration, batch)
            said = (f"physical batch {batch} beyond {beyond} tokens, by its straight line",) if beyond else ()
            yield Candidate(key, fixed, (*derived, *said), settings.kv_cache_type, batch)


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
