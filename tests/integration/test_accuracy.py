"""A real engine fills a device, and what harness says of contexts never loaded is what lies there."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.prediction.memory import predict
from tests.support.synthetic import MODELS

pytestmark = pytest.mark.requires("rpc")


def test_predictions_are_what_an_engine_takes_at_contexts_batches_and_slots_never_loaded(
    tmp_path: Path,
) -> None:
    from tests.support.truth import MODES, Device, calibrate_on, load_truth

    with_flash, _, without = MODES
    cases = [
        ("hybrid", with_flash, True, [(65_536, 2048, 1), (2048, 1024, 4)]),
        ("window", without, False, [(24_576, 512, 1), (2048, 512, 2)]),
    ]
    beyond = []
    models = {name: tmp_path / f"{name}.gguf" for name, _, _, _ in cases}
    for name, path in models.items():
        MODELS[name](path)
    with Device(tmp_path) as device, Device(tmp_path, resident=True) as resident:
        for name, mode, as_ollama, points in cases:
            record, calibration = calibrate_on(device, tmp_path, models[name], mode, as_ollama=as_ollama)
            assert sum(load.request.purpose == "point" for load in record.loads) <= 5
            assert calibration.metadata.quality.valid_to == 131_072
            for context, batch, slots in points:
                truth = load_truth(resident, models[name], mode, context, num_batch=batch, num_parallel=slots)
                predicted = predict(calibration, context, slots).total_bytes
                assert predicted == pytest.approx(truth.logged, rel=0.001), (name, context, batch, slots)
                assert truth.anonymous is not None
                beyond.append(truth.anonymous - truth.logged)
    assert max(beyond) - min(beyond) < 1 << 20, "the device's own process holds what the log says"
