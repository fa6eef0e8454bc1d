"""PCI addresses of the devices that a load used, from llama.cpp's log. Pure."""

from __future__ import annotations

import re
from typing import Final

# src/llama.cpp, ``llama_prepare_model_devices`` (before 2026-04 ``llama_model_load_from_file_impl``), since 2025: name, title,
# address, free memory; "(unknown id)" of a device that has none.
_ADDRESS: Final = rb"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]"
_USING: Final = re.compile(
    rb"using device (?P<name>[A-Za-z]+\d+) \(.*\) \((?P<address>" + _ADDRESS + rb")(?:-v\d+)?\) - \d+ MiB free"
)


def device_addresses(log: bytes) -> dict[str, str]:
    """Names of devices to their PCI addresses in the kernel's spelling; those without one are left out."""
    return {match["name"].decode(): match["address"].decode().lower() for match in _USING.finditer(log)}
