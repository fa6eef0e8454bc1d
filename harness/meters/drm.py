"""GPUs that NVML does not speak for: memory of processes, from the kernel's DRM files and the KFD.

Sources, all of the Linux kernel: Documentation/gpu/drm-usage-stats.rst (``/proc/PID/fdinfo``), amdgpu_fdinfo.c,
xe_drm_client.c, i915_drm_client.c, and amdkfd/kfd_process.c (``vram_<gpuid>``). A figure that cannot be had is ``None`` with a
reason, never 0. A GPU that sleeps is not read: xe wakes it for that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from harness.errors import NotFoundError, UntrustedError
from harness.meters.base import CONTEXT, BaselineMeter
from harness.meters.drm_devices import drm_gpus, is_asleep, kfd_addresses, number_of, sleeping
from harness.model.gpu import LocalGpu
from harness.model.trace import MeterName, Occupancy, Reading
from harness.units import KIB, MIB, format_size

_SIZE: Final = re.compile(r"(\d+)(?: (KiB|MiB))?")
_UNITS: Final = {None: 1, "KiB": KIB, "MiB": MIB}
#: Regions on the device itself, and those of the machine's memory that an integrated GPU uses as its own.
_LOCAL: Final = ("vram", "local")
_SHARED: Final = {"amdgpu": ("gtt",), "xe": ("gtt", "stolen"), "i915": ("system", "stolen")}


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """One open DRM file: its device's address, and the bytes that it holds by region; ``evicted`` of them had to leave it."""

    address: str
    client: str | None
    driver: str
    regions: dict[str, int]
    evicted: int = 0

    def held(self, *, integrated: bool) -> int:
        """Bytes that count as the GPU's."""
        names = (*_LOCAL, *_SHARED.get(self.driver, ())) if integrated else _LOCAL
        return sum(size for region, size in self.regions.items() if region.rstrip("0123456789") in names)


def read_client(text: str) -> Client | None:
    """The text of a ``fdinfo`` file; ``None`` where it is of no PCI GPU.

    ``drm-resident-`` is what is in a region now, ``drm-memory-`` its older name; ``drm-total-`` where a driver has neither.
    """
    facts = {key.strip(): value.strip() for key, found, value in (line.partition(":") for line in text.splitlines()) if found}
    if "drm-driver" not in facts or "drm-pdev" not in facts:
        return None
    regions: dict[str, int] = {}
    for prefix in ("drm-total-", "drm-memory-", "drm-resident-"):  # the later one counts
        for key, value in facts.items():
            if key.startswith(prefix) and not key.startswith("drm-total-cycles") and (size := _bytes(value)) is not None:
                regions[key.removeprefix(prefix)] = size
    return Client(
        address=facts["drm-pdev"].lower(), client=facts.get("drm-client-id"), driver=facts["drm-driver"], regions=regions,
        evicted=_bytes(facts.get("amd-evicted-vram", "")) or 0,
    )  # fmt: skip


def _bytes(value: str) -> int | None:
    match = _SIZE.fullmatch(value)
    return int(match[1]) * _UNITS[match[2]] if match else None


class DrmMeter(BaselineMeter):
    """Memory of the engine's processes on the GPUs at these PCI addresses.

    Raises:
        NotFoundError: no such GPU.
    """

    name: MeterName = "drm"
    #: Every open file of every process is looked at: 3.5 ms with 90 processes and 530 files.
    interval: float = 0.25
    peek_interval: float = 0.05

    def __init__(self, addresses: Sequence[str], sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        super().__init__(addresses)
        self._sys, self._proc = sys, proc
        there = {gpu.key: gpu for gpu in drm_gpus(sys, proc, lambda _node, _driver: [])}
        if missing := [one for one in addresses if one not in there]:
            raise NotFoundError(f"the kernel has no GPU {', '.join(missing)}", code="no-such-gpu")
        self._gpus = {one: there[one] for one in addresses}
        self._cards = {one: self._identity(gpu) for one, gpu in self._gpus.items()}
        self._kfd = kfd_addresses(sys)

    def read(self, pids: frozenset[int]) -> Reading:
        """Sum of ``pids`` over the devices, or the devices' rise; other processes there are named in ``other_processes``.

        Raises:
            UntrustedError: a GPU went away, or its driver was reloaded, so the run is void.
        """
        self._raise_if_lost()
        if asleep := [gpu for gpu in self._gpus.values() if is_asleep(self._device(gpu))]:
            return Reading(total_bytes=None, reason=sleeping(asleep[0]), listed=False)
        seen: set[tuple[str, str]] = set()
        devices: dict[str, int] = {}
        evicted = 0
        for pid in sorted(pids):
            held, gone = self._held(pid, seen)
            evicted += gone
            for address, size in held.items():
                devices[address] = devices.get(address, 0) + size
        reported: dict[int, int | None] = {}
        for pid in sorted(self._pids() - pids):
            if size := sum(self._held(pid, seen)[0].values()):
                reported[pid] = size
        if not pids:
            return Reading(total_bytes=None, reason="the engine has no processes", other_processes=reported)
        if evicted > CONTEXT:  # more than a few buffers
            reason = f"the driver moved {format_size(evicted)} of the engine from the GPU to host memory: the GPU is full"
            return Reading(total_bytes=None, reason=reason, other_processes=reported)
        why = self._why_nothing(pids)
        if why is None and not any(devices.values()):
            why = "none of the engine's processes holds memory of the GPU"
        if why is not None:
            return self.rise_instead(why, reported)
        return Reading(total_bytes=sum(devices.values()), devices=devices, other_processes=reported)

    def _held(self, pid: int, seen: set[tuple[str, str]]) -> tuple[dict[str, int], int]:
        """What a process holds of each GPU, and what was evicted: a file that several processes share counts for the first.

        The KFD's own count stands beside it, for what ROCm takes outside the DRM files. What both see is the same memory: the
        larger figure counts.
        """
        held: dict[str, int] = {}
        evicted = 0
        for client in self._clients(pid):
            gpu = self._gpus.get(client.address)
            key = (client.address, client.client or f"of {pid}")
            if gpu is None or (client.client is not None and key in seen):
                continue
            seen.add(key)
            held[gpu.key] = held.get(gpu.key, 0) + client.held(integrated=gpu.shared)
            evicted += 0 if gpu.shared else client.evicted
        for number, address in self._kfd.items():
            size = number_of(self._sys / "class" / "kfd" / "kfd" / "proc" / str(pid) / f"vram_{number}")
            if size and address in self._gpus:
                held[address] = max(held.get(address, 0), size)
        return held, evicted

    def _clients(self, pid: int) -> Iterator[Client]:
        folder = f"{self._proc}/{pid}"
        try:
            names = os.listdir(f"{folder}/fd")  # noqa: PTH208 - pathlib takes several times as long, four times a second
        except OSError:
            return  # it ended, or is another user's
        for name in names:
            try:
                if "/dri/" not in os.readlink(f"{folder}/fd/{name}"):  # noqa: PTH115 - as above
                    continue
                client = read_client(Path(folder, "fdinfo", name).read_text("utf-8", "replace"))
            except OSError:
                continue  # closed meanwhile
            if client is not None:
                yield client

    def _may_read(self, pid: int) -> bool:
        try:
            next((self._proc / str(pid) / "fd").iterdir(), None)
        except (FileNotFoundError, ProcessLookupError):
            return True  # it ended: nothing is kept from us
        except OSError:
            return False
        return True

    def _pids(self) -> frozenset[int]:
        kfd = self._sys / "class" / "kfd" / "kfd" / "proc"
        return frozenset(int(one.name) for root in (self._proc, kfd) for one in _entries(root) if one.name.isdigit())

    def _why_nothing(self, pids: frozenset[int]) -> str | None:
        """Why there is no figure by process, or only a part of it."""
        there = [pid for pid in pids if (self._proc / str(pid)).is_dir()]
        if not there:
            return "the engine's processes are not visible in /proc (it is mounted with hidepid, or they ended)"
        if not all(self._may_read(pid) for pid in there):
            return "the engine runs as another user, whose open files only root may read: start harness as root"
        return None

    def occupancy(self) -> Occupancy:
        """What the GPUs hold now, and the processes on them that may be seen."""
        seen: set[tuple[str, str]] = set()
        held = {pid: sum(self._held(pid, seen)[0].values()) for pid in sorted(self._pids())} if not self._any_asleep() else {}
        return Occupancy(devices=self.used(), processes={pid: size for pid, size in held.items() if size})

    def used(self) -> dict[str, int]:
        """Of amdgpu alone: Intel's drivers have no file for it."""
        self._raise_if_lost()
        used: dict[str, int] = {}
        for address, gpu in self._gpus.items():
            regions = ("vram", "gtt") if gpu.shared else ("vram",)
            sizes = [number_of(self._device(gpu) / f"mem_info_{region}_used") for region in regions]
            known = [size for size in sizes if size is not None]
            if known and sizes[-1] is not None and not is_asleep(self._device(gpu)):
                used[address] = sum(known)
        return used

    def _device(self, gpu: LocalGpu) -> Path:
        return self._sys / "class" / "drm" / gpu.card / "device"

    def _any_asleep(self) -> bool:
        return any(is_asleep(self._device(gpu)) for gpu in self._gpus.values())

    def _identity(self, gpu: LocalGpu) -> int | None:
        try:
            return (self._sys / "class" / "drm" / gpu.card).stat().st_ino
        except OSError:
            return None

    def _raise_if_lost(self) -> None:
        for address, gpu in self._gpus.items():
            if self._identity(gpu) != self._cards[address]:
                raise UntrustedError(f"GPU {address} went away during the run, or its driver was reloaded", code="gpu-lost")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
