"""``harness doctor --measure-overhead``: the driver's part of a GPU's memory, so that other GPUs' calibrations can be used."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from harness.engines.registry import EMBEDDED
from harness.errors import UnavailableError
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.options import RunOptions
from harness.prediction.gpu_transfer import DriverOverhead
from harness.serving.driver_overhead import keep_overhead
from harness.store.store import Store

_CONTEXTS: Final = (2048, 4096, 8192)


def measure_overhead(
    store: Store, here: Path, observer: Observer, *, gpus: str = "all", binary: str | None = None
) -> DriverOverhead:
    """Calibrate the embedded model on one GPU and keep what NVML saw beyond the log.

    Raises:
        UnavailableError: the engine sees no GPU that NVML measures. HarnessError: as of any calibration.
    """
    options = RunOptions(engine=EMBEDDED, sandbox="process", contexts=_CONTEXTS, speed=False, gpus=gpus, engine_binary=binary)
    with tempfile.TemporaryDirectory(prefix="harness-overhead-") as name:
        session = prepare(options, Store(Path(name)), here)
        if session.choice.meter != "nvml" or len(session.choice.gpus) != 1:
            raise UnavailableError(
                "the driver's overhead is measured on one NVIDIA GPU, which the engine and NVML must both see",
                hint="choose one with --gpus; harness doctor says what is there",
                code="no-nvml",
            )
        calibration = session.calibrate(observer).calibration
    metadata = calibration.metadata
    (gpu,) = metadata.machine.gpus
    if metadata.breakdown_gb.overhead is None:
        raise UnavailableError("the driver gave no figure for the engine's processes", code="no-reading")
    found = DriverOverhead(
        gpu=gpu.name,
        overhead_gb=metadata.breakdown_gb.overhead,
        driver=gpu.driver,
        engine=f"{calibration.engine} {metadata.engine.version}",
        measured_at=metadata.calibrated_at,
    )
    keep_overhead(store, found)
    return found
