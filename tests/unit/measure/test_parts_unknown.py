"""An engine whose log says nothing that is understood: what the meter measured is kept, and the parts are unknown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from harness.errors import UnknownVerdictError
from harness.model.calibration import PARTS_UNKNOWN
from harness.prediction.memory import predict
from harness.units import MIB
from tests.support.fakes import World, calibrate
from tests.support.true_model import TrueModel

MODEL: Final = TrueModel(weights=700 * MIB, overhead=300 * MIB, kv_per_cell=12_288)
CONTEXTS: Final = (4096, 8192, 16384)
#: How a log can become strange: it is in other words altogether, or one kind of line is.
STRANGE: Final = {
    "another language": lambda text: "bufro estas preta\n" * text.count("\n"),
    "no buffers": lambda text: re.sub(r"buffer size|KV size|size = ", "room of", text),
    "no caches": lambda text: re.sub(r".*(?:llama_kv_cache|kv_cache).*\n", "", text),
    "nothing": lambda _: "",
}


def strange(world: World, how: str) -> World:
    world.log_edits = dict.fromkeys(CONTEXTS, STRANGE[how])
    return world


@pytest.mark.parametrize("target", ["host", "gpu"])
@pytest.mark.parametrize("how", STRANGE)
def test_totals_are_fitted_and_predict_what_was_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, target: str
) -> None:
    model = MODEL
    world = strange(World(model, target=target), how)  # type: ignore[arg-type]
    calibration = calibrate(world, monkeypatch, tmp_path, contexts=CONTEXTS).calibration
    metadata = calibration.metadata
    parts = metadata.breakdown_gb
    assert (parts.weights, parts.fixed_cache, parts.compute, parts.overhead) == (None, None, None, None)
    assert [band.fixed_cache_gb for band in metadata.bands] == [None]
    assert PARTS_UNKNOWN in metadata.quality.notes[0]
    assert (metadata.quality.max_error or 0) < 0.001
    assert metadata.quality.valid_to == max(CONTEXTS), "nothing says what comes after the loads"
    prediction = predict(calibration, 12_288)
    assert prediction.total_bytes == pytest.approx(model.truth(12_288, 512), rel=0.001)
    assert prediction.weights_bytes is None
    assert PARTS_UNKNOWN in prediction.warnings


def test_another_number_of_slots_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrate(strange(World(MODEL), "nothing"), monkeypatch, tmp_path, contexts=CONTEXTS).calibration
    with pytest.raises(UnknownVerdictError, match="does not follow what 2 slots take"):
        predict(calibration, 4096, 2)
