"""GPUs of AMD and Intel, by PCI address: what they are and what is free, from sysfs and the drivers' own lists.

Sources, all of the Linux kernel: Documentation/gpu/amdgpu/driver-misc.rst (``mem_info_*``), include/uapi/drm/xe_drm.h and
i915_drm.h (memory regions), drivers/gpu/drm/amd/amdkfd/kfd_topology.c, Documentation/power/runtime_pm.rst. A GPU that sleeps
(runtime power management) is not asked: opening it would wake it, and what it held is in host memory then.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from harness.meters.host import machine_available
from harness.model.gpu import LocalGpu
from harness.units import GIB

Driver = Literal["amdgpu", "xe", "i915"]
#: PCI vendor numbers, and what engines' names of such devices hold (Vulkan's are the driver's own, ROCm's the product's).
_VENDORS: Final = {"0x1002": ("AMD", r"\b(AMD|Radeon|ATI)\b|\bgfx\d"), "0x8086": ("Intel", r"\b(Intel|Arc|Iris|UHD)\b")}
#: Intel's integrated GPUs have this address on every machine.
_INTEL_INTEGRATED: Final = "0000:00:02.0"
#: What ``ioctl`` is asked (drm.h, ``DRM_IOWR``) for the memory regions of xe and i915, and the layout of a region.
_QUERY_XE: Final = 0xC0286440
_QUERY_I915: Final = 0xC0106479
_XE_REGION: Final = struct.Struct("<HHIQQQQ48x")
_I915_REGION: Final = struct.Struct("<HHIQQ64x")
_DEVICE_MEMORY: Final = 1


def drm_gpus(sys: Path = Path("/sys"), proc: Path = Path("/proc"), query: Query | None = None) -> list[LocalGpu]:
    """GPUs of AMD and Intel, in the order of their addresses; reading wakes none that sleeps."""
    found = []
    gfx = {address: version for _, address, version in _kfd_nodes(sys)}
    for card in sorted((sys / "class" / "drm").glob("card*")):
        if re.fullmatch(r"card\d+", card.name):
            facts = dict(line.partition("=")[::2] for line in text_of(card / "device" / "uevent").splitlines())
            if facts.get("DRIVER") in get_args(Driver) and facts.get("PCI_SLOT_NAME"):
                found.append(_gpu(card, facts, proc, query or memory_regions, gfx))
    return sorted(found, key=lambda gpu: gpu.key)


def _gpu(card: Path, facts: dict[str, str], proc: Path, query: Query, gfx: dict[str, int]) -> LocalGpu:
    device, address = card / "device", facts["PCI_SLOT_NAME"].lower()
    driver: Driver = facts["DRIVER"]  # type: ignore[assignment]
    vendor = _VENDORS.get(text_of(device / "vendor").strip(), ("PCI", ""))[0]
    number = facts.get("PCI_ID", "").lower() or "unknown"
    gpu = LocalGpu(
        key=address, uuid=address, driver=driver, name=f"{vendor} GPU {number}", card=card.name, gfx=gfx.get(address),
        shared=_is_integrated(device, driver, address), asleep=is_asleep(device),
    )  # fmt: skip
    if gpu.asleep:
        total = _amd_total(device, integrated=gpu.shared) if driver == "amdgpu" else _xe_total(device)
        return msgspec.structs.replace(gpu, total_bytes=total, why=sleeping(gpu))
    if driver == "amdgpu":
        return _sized_amd(gpu, device, proc)
    if gpu.shared:
        return msgspec.structs.replace(gpu, free_bytes=machine_available(proc))
    return _sized_intel(gpu, device, driver, query)


def sleeping(gpu: LocalGpu) -> str:
    """Why a GPU that sleeps is not read, and how to keep it awake."""
    return (
        f"GPU {gpu.key} sleeps (runtime power management), and is not woken to be read; as root, "
        f"echo on > /sys/bus/pci/devices/{gpu.key}/power/control keeps it awake"
    )


def is_asleep(device: Path) -> bool:
    """Whether runtime power management has put a device to sleep; reading this does not wake it."""
    return text_of(device / "power" / "runtime_status").strip() in ("suspended", "suspending")


def _is_integrated(device: Path, driver: Driver, address: str) -> bool:
    """AMD: amdgpu shows no ``mem_busy_percent`` of an APU (amdgpu_pm.c); an older kernel: Ollama's test by the sizes."""
    if driver != "amdgpu":
        return address == _INTEL_INTEGRATED
    if (device / "gpu_busy_percent").exists():
        return not (device / "mem_busy_percent").exists()
    vram, gtt = number_of(device / "mem_info_vram_total") or 0, number_of(device / "mem_info_gtt_total") or 0
    return vram <= 4 * GIB and gtt >= max(8 * GIB, 4 * vram)


def _amd_total(device: Path, *, integrated: bool) -> int | None:
    sizes = [number_of(device / f"mem_info_{region}_total") for region in (("vram", "gtt") if integrated else ("vram",))]
    return sum(size for size in sizes if size) or None


def _sized_amd(gpu: LocalGpu, device: Path, proc: Path) -> LocalGpu:
    """An APU has its carve-out beside the GTT, and the GTT has what the machine has left."""
    free: dict[str, int] = {}
    for region in ("vram", "gtt"):
        total, used = (number_of(device / f"mem_info_{region}_{word}") for word in ("total", "used"))
        if total is not None and used is not None:
            free[region] = max(total - used, 0)
    total = _amd_total(device, integrated=gpu.shared)
    if not gpu.shared:
        why = None if "vram" in free else "amdgpu does not say how much of its memory is used"
        return msgspec.structs.replace(gpu, total_bytes=total, free_bytes=free.get("vram"), why=why)
    host = machine_available(proc)
    if "gtt" not in free or host is None:
        return msgspec.structs.replace(gpu, total_bytes=total, why="amdgpu does not say how much of the GTT is used")
    return msgspec.structs.replace(gpu, total_bytes=total, free_bytes=free.get("vram", 0) + min(free["gtt"], host))


def _xe_total(device: Path) -> int | None:
    return sum(number_of(file) or 0 for file in device.glob("tile*/physical_vram_size_bytes")) or None


def _sized_intel(gpu: LocalGpu, device: Path, driver: Driver, query: Query) -> LocalGpu:
    """From the driver's own list of regions. Without the right to it, ``used`` is 0, and so is not known."""
    node = next(iter(sorted((device / "drm").glob("render*"))), None)
    try:
        regions = query(Path("/dev/dri") / (node.name if node else gpu.card), driver)
    except OSError as error:
        why = f"{driver} does not answer about its memory: {error.strerror}"
        return msgspec.structs.replace(gpu, total_bytes=_xe_total(device), why=why)
    total, used = sum(total for total, _ in regions), sum(used for _, used in regions)
    if used == 0:
        why = f"{driver} tells how much is used only to root (CAP_PERFMON)"
        return msgspec.structs.replace(gpu, total_bytes=total or _xe_total(device), why=why)
    return msgspec.structs.replace(gpu, total_bytes=total, free_bytes=max(total - used, 0))


#: Asks a node of /dev/dri: total and used bytes of each region on the device.
Query = Callable[[Path, Driver], list[tuple[int, int]]]


def memory_regions(node: Path, driver: Driver) -> list[tuple[int, int]]:
    """Total and used bytes of each memory region on a device of Intel's.

    Raises:
        OSError: the node is not there, may not be opened, or the driver does not know the question.
    """
    descriptor = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        return read_regions(_answer(descriptor, driver), driver)
    finally:
        os.close(descriptor)


def _answer(descriptor: int, driver: Driver) -> bytes:
    """Asked twice, as both drivers want it: for the size of the answer, and for the answer."""
    size, data = 0, array("B")
    for _ in range(2):
        data = array("B", bytes(size))
        place = data.buffer_info()[0] if size else 0
        if driver == "xe":  # struct drm_xe_device_query
            request = bytearray(struct.pack("<QIIQQQ", 0, 1, size, place, 0, 0))
            fcntl.ioctl(descriptor, _QUERY_XE, request)
            size = struct.unpack_from("<I", request, 12)[0]
        else:  # struct drm_i915_query with one struct drm_i915_query_item
            item = array("B", struct.pack("<QiIQ", 4, size, 0, place))
            fcntl.ioctl(descriptor, _QUERY_I915, bytearray(struct.pack("<IIQ", 1, 0, item.buffer_info()[0])))
            size = struct.unpack_from("<i", item, 8)[0]
            if size < 0:
                raise OSError(-size, os.strerror(-size))
    return data.tobytes()


def read_regions(answer: bytes, driver: Driver) -> list[tuple[int, int]]:
    """Total and used bytes of the regions on the device, from xe's or i915's answer (``drm_*_query_mem*_regions``)."""
    layout, head = (_XE_REGION, 8) if driver == "xe" else (_I915_REGION, 16)
    found = []
    for index in range(struct.unpack_from("<I", answer)[0]):
        kind, _, _, total, size = layout.unpack_from(answer, head + index * layout.size)[:5]
        if kind == _DEVICE_MEMORY:  # i915 gives what is left, xe what is used
            found.append((total, size if driver == "xe" else max(total - size, 0)))
    return found


def matching(listed: Sequence[LocalGpu], gpus: Sequence[LocalGpu]) -> tuple[LocalGpu, ...]:
    """The GPU of each device that an engine lists by title and total bytes; empty unless all are found.

    The list has no addresses: the vendor in the title decides, then the nearest size. What the engine logs of a load has the
    address, and is compared afterwards.
    """
    left, found = list(gpus), []
    for one in listed:
        vendors = [vendor for vendor, pattern in _VENDORS.values() if re.search(pattern, one.name)]
        size = one.total_bytes or 0
        near = sorted(
            (gpu for gpu in left if gpu.name.split()[0] in vendors), key=lambda gpu: abs((gpu.total_bytes or 0) - size)
        )
        if not near:
            return ()
        left.remove(near[0])
        found.append(near[0])
    return tuple(found)


def hidden_processes(proc: Path = Path("/proc")) -> str | None:
    """Why other users' processes cannot be seen on the GPUs; ``None`` where they can."""
    mounts = [line.split() for line in text_of(proc / "self" / "mounts").splitlines()]
    options = next((words[3] for words in mounts if words[1:2] == ["/proc"]), "")
    if re.search(r"hidepid=(?!0|off)", options):
        return "/proc is mounted with hidepid"
    return None if os.geteuid() == 0 else "the open files of other users' processes may be read by root alone"


def pci_displays(sys: Path) -> Iterator[tuple[Path, str]]:
    """Display controllers (``PCI_BASE_CLASS_DISPLAY``): the folder of each in sysfs, and its vendor's number."""
    for device in sorted((sys / "bus" / "pci" / "devices").glob("*")):
        if text_of(device / "class").startswith("0x03"):
            yield device, text_of(device / "vendor").strip()


def kfd_addresses(sys: Path) -> dict[int, str]:
    """The KFD's number of each GPU, and its PCI address."""
    return {number: address for number, address, _ in _kfd_nodes(sys)}


def _kfd_nodes(sys: Path) -> list[tuple[int, str, int]]:
    """Number, address and ``gfx_target_version`` of each GPU (kfd_topology.c: ``location_id`` is bus, device, function)."""
    found = []
    for node in (sys / "class" / "kfd" / "kfd" / "topology" / "nodes").glob("*"):
        number = number_of(node / "gpu_id")
        words = [line.split() for line in text_of(node / "properties").splitlines()]
        facts = {key: int(value) for key, value in (one for one in words if len(one) == 2) if value.isdigit()}
        if number and "location_id" in facts:
            place = facts["location_id"]
            address = f"{facts.get('domain', 0):04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
            found.append((number, address, facts.get("gfx_target_version", 0)))
    return found


def text_of(path: Path) -> str:
    """The text of a file of /proc or /sys; empty where it cannot be read."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def number_of(path: Path) -> int | None:
    """The number in such a file; ``None`` where there is none."""
    text = text_of(path).strip()
    return int(text) if text.isdigit() else None
