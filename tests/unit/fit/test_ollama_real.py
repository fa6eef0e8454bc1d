"""What two real Ollamas left behind, read again: one that starts llama.cpp's server, one of the Go engine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.fit.constants import fit_record
from harness.maintain.refit import refit
from harness.store.yaml import read_calibration
from harness.units import GIB, gib

GOLDEN = Path(__file__).parents[2] / "golden" / "ollama"
#: gemma3-270m: 3 full-attention layers of 18, one KV head of 256 + 256 values, two bytes each.
KV_PER_TOKEN = 3 * 1024


@pytest.mark.parametrize(("release", "batches"), [("0.32.14", [512, 1024]), ("0.20.2", [512])])
def test_a_real_run_gives_its_artifact_again_from_its_record(release: str, batches: list[int]) -> None:
    folder = GOLDEN / f"{release}-cpu"
    written = read_calibration(folder / "gemma3-270m.yaml")

    record, again = refit(folder)

    assert again.constants == written.constants
    assert again.metadata.bands == written.metadata.bands
    assert again.metadata.quality == written.metadata.quality
    assert again.metadata.engine.version == release
    assert again.constants.kv_cache_gb_per_10k == gib(KV_PER_TOKEN * 10_000)
    assert {band.num_batch for band in again.metadata.bands} == set(batches)
    assert again.metadata.model.digest == record.model.digest is not None


@pytest.mark.parametrize("release", ["0.32.14", "0.20.2"])
def test_its_shorter_contexts_predict_the_longest(release: str) -> None:
    record, _ = refit(GOLDEN / f"{release}-cpu")
    longest = max(load.request.context for load in record.loads)
    (last,) = [load for load in record.loads if load.request.context == longest]
    assert last.idle is not None
    shorter = tuple(load for load in record.loads if load is not last)

    constants = fit_record(msgspec.structs.replace(record, loads=shorter)).constants

    units = longest / 10_000
    predicted = constants.base_vram_gb + units * (constants.kv_cache_gb_per_10k + constants.compute_gb_per_10k)
    assert predicted * GIB == pytest.approx(last.idle.total_bytes, rel=0.01)
