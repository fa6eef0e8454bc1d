"""A calibration of one GPU, used for another: weights, caches and compute are the engine's, the driver's part is the GPU's."""

from __future__ import annotations

from typing import Final

import msgspec

from harness.model.calibration import Calibration, Performance
from harness.model.record import Gpu

#: Sizes in artifacts have six decimals.
_DIGITS: Final = 6


class DriverOverhead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the driver takes on one GPU for a process beyond what the engine logs, GiB; measured with ``engine``."""

    gpu: str
    overhead_gb: float
    driver: str | None
    engine: str
    measured_at: str


def transferred(calibration: Calibration, overhead: DriverOverhead) -> Calibration:
    """The calibration as it would be on the other GPU, as far as that is known: its driver's overhead, and no speeds.

    One GPU takes the place of one; a calibration of several GPUs is returned as it is.
    """
    metadata = calibration.metadata
    if len(metadata.machine.gpus) != 1:
        return calibration
    more = overhead.overhead_gb - (metadata.breakdown_gb.overhead or 0.0)
    bands = tuple(
        msgspec.structs.replace(
            band,
            base_vram_gb=round(band.base_vram_gb + more, _DIGITS),
            overhead_gb=None if band.overhead_gb is None else round(band.overhead_gb + more, _DIGITS),
        )
        for band in metadata.bands
    )
    gpu = Gpu(name=overhead.gpu, driver=overhead.driver)
    return msgspec.structs.replace(
        calibration,
        constants=msgspec.structs.replace(calibration.constants, base_vram_gb=bands[-1].base_vram_gb),
        metadata=msgspec.structs.replace(
            metadata,
            bands=bands,
            breakdown_gb=msgspec.structs.replace(metadata.breakdown_gb, overhead=overhead.overhead_gb),
            machine=msgspec.structs.replace(metadata.machine, gpus=(gpu,)),
            placement=msgspec.structs.replace(metadata.placement, start_gb=None),
            performance=Performance(
                load_s=None, prompt_tokens_per_s=None, decode_tokens_per_s=None, host_decode_tokens_per_s=None
            ),
        ),
    )
