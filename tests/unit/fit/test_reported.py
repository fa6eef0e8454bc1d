"""An engine's own figure beside its log: a cross-check, never a measurement."""

from __future__ import annotations

import msgspec
import pytest

from harness.fit.constants import fit_record
from harness.model.record import Load, Reported
from tests.support.records import KV_PER_TOKEN, load, record


def said(context: int, off: int) -> Load:
    """A load of which the engine says so many bytes more than its log."""
    one = load(context)
    assert one.facts is not None
    logged = sum(one.facts.total(part, "gpu") or 0 for part in ("weights_bytes", "kv_cache_bytes", "compute_bytes"))
    return msgspec.structs.replace(one, reported=Reported(total_bytes=logged * 2, gpu_bytes=logged + off, context=context))


@pytest.mark.parametrize("off", [-(3 << 30), 1 << 29])
def test_where_the_engine_says_something_else_a_note_says_so_once(off: int) -> None:
    calibration = fit_record(record(said(8192, 0), said(16384, 0), said(32768, off)))
    (note,) = [note for note in calibration.metadata.quality.notes if "/api/ps" in note]
    assert note.startswith("context 32,768: ")
    assert calibration.constants.kv_cache_gb_per_10k * (1 << 30) / 10_000 == pytest.approx(KV_PER_TOKEN, rel=0.001)


def test_where_they_agree_nothing_is_said() -> None:
    calibration = fit_record(record(said(8192, 0), said(16384, 1 << 19), load(32768)))
    assert not [note for note in calibration.metadata.quality.notes if "/api/ps" in note]
