"""GPUs of AMD and Intel in a run: which of an engine's devices they are, and which of them an engine leaves alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.model.record import Gpu
from harness.units import gib

if TYPE_CHECKING:
    from harness.meters.drm_devices import DrmGpu


def drm_gpus() -> list[DrmGpu]:
    """GPUs of AMD and Intel that are here."""
    from harness.meters.drm_devices import drm_gpus as found

    return found()


def recorded(gpus: Sequence[DrmGpu] | None = None) -> tuple[Gpu, ...]:
    """They as a record names them: all that are here, or those given."""
    return tuple(
        Gpu(name=gpu.name, uuid=gpu.address, memory_gb=gib(gpu.total_bytes) if gpu.total_bytes else None, driver=gpu.driver)
        for gpu in (drm_gpus() if gpus is None else gpus)
    )


def used_by_default(devices: Mapping[str, tuple[str, int, int]]) -> dict[str, tuple[str, int, int]]:
    """Of the devices that llama.cpp lists (name to title, total, free), those that it uses where none is named.

    Integrated GPUs only where there is no other (src/llama.cpp, ``llama_prepare_model_devices``).
    """
    from harness.meters.drm_devices import matching

    here = drm_gpus() if len(devices) > 1 else []
    if not any(gpu.integrated for gpu in here):
        return dict(devices)
    found = {name: matching([facts[:2]], here) for name, facts in devices.items()}
    discrete = {name: devices[name] for name, gpus in found.items() if not gpus or not gpus[0].integrated}
    return discrete or dict(devices)


def kernel_gpus(devices: Mapping[str, tuple[str, int, int]]) -> tuple[DrmGpu, ...]:
    """The kernel's GPU of each device that an engine lists; empty unless all are found."""
    from harness.meters.drm_devices import matching

    return matching([facts[:2] for facts in devices.values()], drm_gpus())
