"""The driver's part of a GPU's memory, measured once a GPU, so that calibrations of other GPUs can be used on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from harness.engines.registry import EMBEDDED
from harness.errors import UnavailableError
from harness.options import RunOptions
from harness.prediction.gpu_transfer import DriverOverhead, transferred
from harness.store.store import Store, write_atomically

if TYPE_CHECKING:
    from harness.measure.events import Observer
    from harness.model.calibration import Calibration

_FILE: Final = "overheads.json"
_CONTEXTS: Final = (2048, 4096, 8192)


def known_overheads(store: Store) -> dict[str, DriverOverhead]:
    """Overheads measured into this store, by the GPU's name; none where the file is absent or damaged."""
    try:
        found = msgspec.json.decode((store.root / _FILE).read_bytes(), type=list[DriverOverhead])
    except (OSError, msgspec.DecodeError):
        return {}
    return {one.gpu: one for one in found}


def measure_overhead(
    store: Store, here: Path, observer: Observer, *, gpus: str = "all", binary: str | None = None
) -> DriverOverhead:
    """Calibrate the embedded model on one GPU and keep what NVML saw beyond the log.

    Raises:
        UnavailableError: the engine sees no GPU that NVML measures. HarnessError: as of any calibration.
    """
    from harness.measure.prepare import prepare

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
    kept = {**known_overheads(store), found.gpu: found}
    text = msgspec.json.format(msgspec.json.encode(list(kept.values())), indent=1) + b"\n"
    write_atomically(store.root / _FILE, text)
    return found


def on_this_gpu(calibration: Calibration, here: str, store: Store) -> tuple[Calibration, str | None]:
    """A calibration for the GPU named ``here``, and what to say of it.

    One of another GPU takes on this GPU's own overhead where that was measured, else it stays as it is, with advice.
    """
    machine = calibration.metadata.machine
    if machine.meter == "log" or len(machine.gpus) != 1 or machine.gpus[0].name == here:
        return calibration, None
    there, overhead = machine.gpus[0].name, known_overheads(store).get(here)
    if overhead is None:
        return calibration, f"the driver's part is that of {there}; harness doctor --measure-overhead measures it here"
    said = (
        f"the engine's part was measured on {there}, the driver's ({overhead.overhead_gb:.2f} GiB) on {here} "
        f"with {overhead.engine}; speeds on {here} are not known"
    )
    return transferred(calibration, overhead), said
