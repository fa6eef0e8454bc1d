"""Settings of one model whose memory is known: those that were measured, and those that follow exactly from them.

Nothing is interpolated: a KV cache type is measured or derived by the sizes of its blocks (:mod:`harness.prediction.settings`),
a physical batch is one of those that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from harness.model.calibration import Calibration
from harness.model.kv_types import VALUE_BYTES
from harness.prediction.rules import Rules
from harness.prediction.settings import AskedSettings, at_batch, derive

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
    only = None if several else next(iter(measured), None)
    as_it_is = asked.num_batch is None or (not several and asked.num_batch == only)
    for batch in (*((None,) if as_it_is else ()), *(measured if several else ())):
        identity = (settings.kv_cache_type, settings.flash_attention, batch or (None if several else tuple(measured)))
        if identity in seen or (batch is not None and asked.num_batch not in (None, batch)):
            continue
        seen.add(identity)
        if batch is None:
            yield Candidate(key, calibration, derived, settings.kv_cache_type, only)
        else:
            fixed, beyond = at_batch(calibration, batch)
            said = (f"physical batch {batch:,} beyond {beyond:,} tokens, by its straight line",) if beyond else ()
            yield Candidate(key, fixed, (*derived, *said), settings.kv_cache_type, batch)
