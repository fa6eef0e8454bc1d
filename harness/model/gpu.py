"""A GPU of this machine, as its driver, the kernel or an engine lists it: data."""

from __future__ import annotations

import msgspec

from harness.model.record import Gpu
from harness.units import gib


class LocalGpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU at this moment, or one instance of a GPU that is split (``mig``). Bytes; ``None`` is not known.

    ``key`` names it: NVIDIA's index, the PCI address of one of AMD or Intel, else the engine's own name of it (``Vulkan0``).
    ``uuid`` is NVIDIA's, or the PCI address. ``why`` says why ``free_bytes`` is not known. ``shared``: it uses the machine's
    memory; then ``free_bytes`` is bound by ``MemAvailable``, and by no cgroup: the kernel does not charge what a GPU maps (GTT)
    to one. ``asleep``: by runtime power management. ``card`` is its name in ``/sys/class/drm``, ``gfx`` ROCm's name of it as a
    number (110501: gfx1151).
    """

    key: str
    name: str
    uuid: str | None = None
    driver: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    why: str | None = None
    shared: bool = False
    mig: bool = False
    asleep: bool = False
    card: str = ""
    gfx: int | None = None

    @property
    def recorded(self) -> Gpu:
        """It as a record names it."""
        memory = gib(self.total_bytes) if self.total_bytes else None
        return Gpu(name=self.name, uuid=self.uuid, memory_gb=memory, driver=self.driver)
