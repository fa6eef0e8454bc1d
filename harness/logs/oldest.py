"""llama.cpp of 2023: sums for "VRAM" and for memory, before every buffer had its own line. "MB" means MiB there.

Formats: llama.cpp llama.cpp between 2023-06 (``llama_model_load_internal``) and 2024-01 (``system memory used``), ggml-metal.m
(``ggml_metal_add_buffer``). Until 2023-10 ``VRAM used`` counts the K and V caches that were offloaded, until 2023-08 the
scratch buffer as well.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from harness.logs.numbers import SIZE, mib

Part = Literal["weights", "kv_cache", "recurrent", "compute", "output", "projector", "lora"]

_SIZE: Final = r"\s*[:=]\s*" + SIZE + " Mi?B"
_PATTERNS: Final = {
    "all_vram": re.compile(r"load_internal: total VRAM used" + _SIZE),
    "vram": re.compile(r"load_(?:tensors|internal): VRAM used" + _SIZE),
    "host": re.compile(r"(?:mem required |system memory used)" + _SIZE),
    "state": re.compile(r"\(\+\s*" + SIZE + r" MB per state\)"),
    "scratch": re.compile(r"= (\d{1,12}) MB VRAM for the scratch buffer"),
    "kv_vram": re.compile(r"VRAM kv self" + _SIZE),
    "kv": re.compile(r"(?:KV|kv) self size" + _SIZE),
    "compute": re.compile(r"compute buffer total size" + _SIZE),
    "compute_vram": re.compile(r"VRAM scratch buffer" + _SIZE),
}
_METAL: Final = re.compile(r"metal_add_buffer: allocated '(\w{1,40})\s{0,40}' buffer, size" + _SIZE)
_METAL_PARTS: Final = {"data": "metal_data", "kv": "kv_vram"}
_BACKEND: Final = re.compile(r"using (CUDA|ROCm|OpenCL) for GPU acceleration")


def read(found: dict[str, int], line: str) -> str | None:
    """Take the figures of a line into ``found``; returns the device's name where the line says it."""
    for key, pattern in _PATTERNS.items():
        if match := pattern.search(line):
            found[key] = mib(match[1])
    if "load_tensors: offloading " in line or "load_internal: offloading " in line:
        for cache in ("k", "v"):
            if f"offloading {cache} cache to GPU" in line:
                found[f"{cache}_counted"] = 1
        return None
    if metal := _METAL.search(line):
        key = _METAL_PARTS.get(metal[1], "compute_vram")
        found[key] = (found.get(key, 0) if key != "kv_vram" else 0) + mib(metal[2])
        return "Metal"
    backend = _BACKEND.search(line)
    return f"{backend[1]}0" if backend else None


def spread(found: dict[str, int], device: str, *, has_cache: bool) -> dict[tuple[str, Part], int]:
    """What such sums mean by device; bytes. ``has_cache``: the caches have lines of their own."""
    cache = 0 if has_cache else found.get("kv", found.get("state", 0))
    counted = cache // 2 * (found.get("k_counted", 0) + found.get("v_counted", 0))
    on_device = min(found.get("kv_vram", counted), cache or found.get("kv_vram", 0))
    weights = found.get("vram", 0) - counted
    if "all_vram" in found:
        weights = found["all_vram"] - counted - found.get("scratch", 0)
    parts: dict[tuple[str, Part], int] = {
        (device, "weights"): found.get("metal_data", weights),
        (device, "kv_cache"): on_device,
        (device, "compute"): found.get("compute_vram", found.get("scratch", 0)),
    }
    if "metal_data" not in found:  # Metal maps the same memory
        parts["CPU", "weights"] = found.get("host", 0)
        parts["CPU", "kv_cache"] = cache - on_device
        parts["CPU", "compute"] = found.get("compute", 0)
    return {where: size for where, size in parts.items() if size > 0}
