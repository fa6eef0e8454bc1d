"""The driver's part of a GPU's memory, measured once a GPU, so that calibrations of other GPUs can be used on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from harness.prediction.gpu_transfer import DriverOverhead, transferred
from harness.store.store import Store, write_atomically

if TYPE_CHECKING:
    from harness.model.calibration import Calibration

_FILE: Final = "overheads.json"


def known_overheads(store: Store) -> dict[str, DriverOverhead]:
    """Overheads measured into this store, by the GPU's name; none where the file is absent or damaged."""
    try:
        found = msgspec.json.decode((store.root / _FILE).read_bytes(), type=list[DriverOverhead])
    except (OSError, msgspec.DecodeError):
        return {}
    return {one.gpu: one for one in found}


def keep_overhead(store: Store, found: DriverOverhead) -> None:
    """Keep one in this store."""
    kept = {**known_overheads(store), found.gpu: found}
    write_atomically(store.root / _FILE, msgspec.json.format(msgspec.json.encode(list(kept.values())), indent=1) + b"\n")


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
