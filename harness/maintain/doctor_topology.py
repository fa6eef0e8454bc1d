"""Which GPUs this machine has beside each other: vendors, PCIe links, memory nodes, and remote devices of llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from harness.engines.running import SILENT_HINT, remote_servers, silence
from harness.meters.drm_devices import pci_displays, text_of
from harness.model.finding import Finding

#: PCI vendors of GPUs (pci.ids).
_VENDORS: Final = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


class _Link(NamedTuple):
    """A GPU's link as the kernel has it (Documentation/ABI/testing/sysfs-bus-pci); a part that it does not say is empty."""

    address: str
    vendor: str
    speed: str
    width: str
    most: str
    node: str

    @property
    def narrow(self) -> bool:
        return self.width.isdecimal() and self.most.isdecimal() and int(self.width) < int(self.most)

    def __str__(self) -> str:
        wide = f" x{self.width}{f' of x{self.most}' if self.narrow else ''}" if self.width.isdecimal() else ""
        speed = (
            f"PCIe {self.speed.removesuffix(' PCIe')}{wide}" if self.speed and "Unknown" not in self.speed else "link not known"
        )
        node = f", memory node {self.node}" if self.node.isdecimal() else ""
        return f"{self.address} {self.vendor}, {speed}{node}"


def topology_findings(sys: Path = Path("/sys"), environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """GPUs by their PCI address, and the servers of ``LLAMA_ARG_RPC``; nothing where there is neither."""
    links = list(_links(sys))
    vendors = dict.fromkeys(link.vendor for link in links)
    if links:
        mixed, narrow = len(vendors) > 1, any(link.narrow for link in links)
        hint = None
        if mixed:
            hint = "an engine puts cards of one library together: CUDA, ROCm or Vulkan; the others hold nothing of a model"
        elif narrow and len(links) > 1:
            hint = "a narrow link makes what goes from card to card slow; it takes no memory"
        yield Finding(
            subject="GPU topology", code="topology-mixed" if mixed else "topology", state="note" if hint else "ok",
            text="; ".join(map(str, links)), hint=hint,
        )  # fmt: skip
    for server in remote_servers(environ):
        subject = f"remote device {server}"
        if (why := silence(server)) is None:
            yield Finding(subject=subject, code="rpc-ok", state="ok", text="answers (LLAMA_ARG_RPC)")
        else:
            text = f"does not answer: {why}"
            yield Finding(subject=subject, code="rpc-silent", state="missing", text=text, hint=SILENT_HINT)


def _links(sys: Path) -> Iterator[_Link]:
    for folder, number in pci_displays(sys):
        if (vendor := _VENDORS.get(number)) is not None:
            parts = ("current_link_speed", "current_link_width", "max_link_width", "numa_node")
            yield _Link(folder.name, vendor, *(text_of(folder / part).strip() for part in parts))
