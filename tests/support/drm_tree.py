"""Trees of /proc and /sys as the kernel's documents describe them, for GPUs of AMD and Intel.

Layouts: Documentation/gpu/drm-usage-stats.rst, amdgpu_fdinfo.c, xe_drm_client.c, i915_drm_client.c, amdgpu/driver-misc.rst,
kfd_topology.c and kfd_process.c. No such card was at hand: where a real driver differs from these files, no test finds it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
CARD = "0000:03:00.0"
APU = "0000:c5:00.0"
ARC = "0000:04:00.0"
INTEL_IGPU = "0000:00:02.0"
_PCI_ID = {"amdgpu": ("0x1002", "1002:744C"), "xe": ("0x8086", "8086:E20B"), "i915": ("0x8086", "8086:56A0")}


class Tree:
    """A machine's /proc and /sys below a folder of a test."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        self.write(self.proc / "meminfo", f"MemTotal: {128 << 20} kB\nMemAvailable: {100 << 20} kB\n")
        (self.sys / "class" / "drm").mkdir(parents=True)

    def write(self, path: Path, text: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def gpu(self, address: str, driver: str = "amdgpu", *, card: str = "card1", **files: object) -> Path:
        """A GPU with these files in its device's folder; ``__`` in a name is a slash."""
        vendor, pci_id = _PCI_ID.get(driver, ("0x10de", "10DE:2204"))
        device = self.sys / "class" / "drm" / card / "device"
        self.write(device / "uevent", f"DRIVER={driver}\nPCI_CLASS=30000\nPCI_ID={pci_id}\nPCI_SLOT_NAME={address}")
        self.write(device / "vendor", vendor)
        self.write(device / "power" / "runtime_status", "active")
        (device / "drm" / "renderD128").mkdir(parents=True)
        (self.sys / "class" / "drm" / f"{card}-DP-1").mkdir()  # a connector is no GPU
        for name, value in files.items():
            self.write(device.joinpath(*name.split("__")), value)
        return device

    def card(self, used: int = GIB) -> Path:
        """A Radeon with 24 GiB of its own."""
        return self.gpu(
            CARD, mem_info_vram_total=24 * GIB, mem_info_vram_used=used, mem_info_gtt_total=64 * GIB,
            mem_info_gtt_used=64 * MIB, gpu_busy_percent=3, mem_busy_percent=1,
        )  # fmt: skip

    def apu(self, used: int = GIB, carve_out: int = 512 * MIB) -> Path:
        """A Strix Halo: a small carve-out and a large GTT."""
        return self.gpu(
            APU, card="card2", mem_info_vram_total=carve_out, mem_info_vram_used=64 * MIB, mem_info_gtt_total=120 * GIB,
            mem_info_gtt_used=used, gpu_busy_percent=3,
        )  # fmt: skip

    def kfd(self, number: int, location: int, domain: int = 0, node: int = 1) -> None:
        """A GPU that ROCm can use."""
        folder = self.sys / "class" / "kfd" / "kfd" / "topology" / "nodes" / str(node)
        self.write(folder / "gpu_id", number)
        self.write(folder / "properties", f"simd_count 192\nlocation_id {location}\ndomain {domain}\ngfx_target_version 110501")

    def kfd_holds(self, pid: int, number: int, size: int) -> None:
        self.write(self.sys / "class" / "kfd" / "kfd" / "proc" / str(pid) / f"vram_{number}", size)

    def process(self, pid: int, *files: str, target: str = "/dev/dri/renderD128") -> None:
        """A process with these open DRM files (the texts of their ``fdinfo``), and one that is none."""
        folder = self.proc / str(pid)
        shutil.rmtree(folder, ignore_errors=True)
        for number, text in enumerate(("pos:\t0\nflags:\t02\n", *files), start=3):
            self.write(folder / "fdinfo" / str(number), text)
            (folder / "fd").mkdir(exist_ok=True)
            (folder / "fd" / str(number)).symlink_to(target if number > 3 else "/dev/null")

    def end(self, pid: int) -> None:
        shutil.rmtree(self.proc / str(pid))

    def locked(self, pid: int) -> None:
        """A process whose open files may not be read, root or not: a link that leads nowhere answers with an error too."""
        (self.proc / str(pid)).mkdir()
        (self.proc / str(pid) / "fd").symlink_to("fd")

    def reload(self, card: str) -> None:
        """The driver is loaded anew: the card's folder is another one."""
        folder = self.sys / "class" / "drm" / card
        shutil.copytree(folder, folder.with_name("anew"), symlinks=True)
        shutil.rmtree(folder)
        folder.with_name("anew").rename(folder)


def amdgpu(client: int, vram: int, gtt: int = 0, *, address: str = CARD, evicted: int = 0) -> str:
    """Bytes as amdgpu prints them up to Linux 6.12 (amdgpu_fdinfo.c)."""
    return (
        f"pos:\t0\nflags:\t02100002\nmnt_id:\t26\nino:\t543\npasid:\t32771\ndrm-driver:\tamdgpu\ndrm-pdev:\t{address}\n"
        f"drm-client-id:\t{client}\ndrm-memory-vram:\t{vram // 1024} KiB\ndrm-memory-gtt: \t{gtt // 1024} KiB\n"
        f"drm-memory-cpu: \t2048 KiB\namd-memory-visible-vram:\t{vram // 1024} KiB\namd-evicted-vram:\t{evicted // 1024} KiB\n"
        f"drm-engine-gfx:\t1048576 ns\n"
    )


def amdgpu_new(client: int, vram: int, gtt: int = 0, *, address: str = CARD) -> str:
    """Bytes as newer kernels print them: both generations of keys, and what was asked for beside what is there."""
    return (
        f"drm-driver:\tamdgpu\ndrm-client-id:\t{client}\ndrm-pdev:\t{address}\npasid:\t32771\n"
        f"drm-total-cpu:\t0\ndrm-shared-cpu:\t0\ndrm-active-cpu:\t0\ndrm-resident-cpu:\t0\ndrm-purgeable-cpu:\t0\n"
        f"drm-total-gtt:\t{gtt // 1024 + 512} KiB\ndrm-shared-gtt:\t0\ndrm-resident-gtt:\t{gtt // 1024} KiB\n"
        f"drm-total-vram:\t{vram // MIB + 7} MiB\ndrm-shared-vram:\t0\ndrm-active-vram:\t0\ndrm-resident-vram:\t{vram}\n"
        f"drm-memory-vram:\t{vram // 1024} KiB\ndrm-memory-gtt: \t{gtt // 1024} KiB\ndrm-memory-cpu: \t0 KiB\n"
        f"amd-evicted-vram:\t0 KiB\namd-requested-vram:\t{vram // 1024} KiB\n"
    )


def xe(client: int, vram: int, gtt: int = 192 << 10, *, address: str = ARC) -> str:
    """Bytes as xe prints them (xe_drm_client.c); an integrated GPU has no ``vram0``."""
    local = f"drm-total-vram0:\t{vram // 1024} KiB\ndrm-shared-vram0:\t0\ndrm-resident-vram0:\t{vram // 1024} KiB\n"
    return (
        f"drm-driver:\txe\ndrm-client-id:\t{client}\ndrm-pdev:\t{address}\ndrm-total-system:\t0\ndrm-resident-system:\t0\n"
        f"drm-total-gtt:\t{gtt // 1024} KiB\ndrm-resident-gtt:\t{gtt // 1024} KiB\n{local if vram else ''}"
        f"drm-total-stolen:\t0\ndrm-resident-stolen:\t0\ndrm-cycles-rcs:\t28257900\ndrm-total-cycles-rcs:\t7655183225\n"
    )


def i915(client: int, system: int, local: int = 0, *, address: str = INTEL_IGPU) -> str:
    """Bytes as i915 prints them (i915_drm_client.c)."""
    regions = f"drm-total-system0:\t{system}\ndrm-resident-system0:\t{system}\n"
    regions += f"drm-total-local0:\t{local}\ndrm-resident-local0:\t{local}\n" if local else ""
    return f"drm-driver:\ti915\ndrm-pdev:\t{address}\ndrm-client-id:\t{client}\n{regions}drm-engine-render:\t9288864723 ns\n"
