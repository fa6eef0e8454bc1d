"""What llama.cpp would allocate, of a log of it without memory (``no_alloc``, llama.h).

Buffers of weights and caches are 0.00 MiB there; the lines of a cache's size, and of the compute buffers, are as ever
(src/llama-kv-cache.cpp, src/llama-memory-recurrent.cpp, src/llama-context.cpp; b11434, b11549).
"""

from __future__ import annotations

import re
from typing import Final, Literal

from harness.model.facts import CacheFacts
from harness.model.planned import PlannedLoad
from harness.text import one_line
from harness.units import MIB

_MIB: Final = r"(\d{1,9}\.\d\d) MiB"
_CACHE: Final = re.compile(
    rf"llama_kv_cache[a-z_]*: size = +{_MIB} \( *(\d{{1,10}}) cells, +(\d{{1,5}}) layers, +\d+/(\d+) seqs\)"
    rf"(?:, K \((\w+)\): +\S+ MiB, V \((\w+)\))?"
)
_CREATING: Final = re.compile(r"creating +(non-SWA|SWA) KV cache")
_RECURRENT: Final = re.compile(rf"llama_memory_recurrent: size = +{_MIB}")
_COMPUTE: Final = re.compile(rf"sched_reserve: +\S+ compute buffer size = +{_MIB}")
_OUTPUT: Final = re.compile(rf"llama_context: +\S+ +output buffer size = +{_MIB}")
_FLASH: Final = re.compile(r"Flash Attention (?:was auto, set to )?(enabled|disabled)|flash_attn += (enabled|disabled)")

#: A header that the engine has no model for, or none of that shape (src/llama-model.cpp); memory is no reason of the header's.
_REFUSED: Final = re.compile(r"error loading model: (?:error loading model \w+: )?((?!unable to allocate)\S.{0,300})")


def refusal(text: str) -> str | None:
    """Why the engine does not load a model, whatever memory there is; ``None`` where its log does not say so."""
    found = _REFUSED.search(text)
    return None if found is None else one_line(found[1].strip())


def read_plan(text: str, device: str = "CPU") -> PlannedLoad | None:
    """The last plan of a log; ``None`` where it did not come to its end, so that a figure may be missing."""
    caches: list[CacheFacts] = []
    recurrent = output = 0
    compute: int | None = None
    kinds: str | None = None
    flash: Literal["enabled", "disabled"] | None = None
    window = False
    for line in text.splitlines():
        if found := _CREATING.search(line):
            window = found[1] == "SWA"
        if found := _CACHE.search(line):
            size = _bytes(found[1])
            role: Literal["window", "full"] = "window" if window else "full"
            cells, streams = int(found[2]), int(found[4])
            caches.append(CacheFacts(cells=cells, layers=int(found[3]), streams=streams, role=role, devices={device: size}))
            kinds = found[5] if found[5] == found[6] else f"{found[5]}/{found[6]}"
            window = False
        elif found := _RECURRENT.search(line):
            recurrent += _bytes(found[1])
        elif found := _COMPUTE.search(line):
            compute = (compute or 0) + _bytes(found[1])
        elif found := _OUTPUT.search(line):
            output += _bytes(found[1])
        if found := _FLASH.search(line):
            flash = "disabled" if "disabled" in (found[1], found[2]) else "enabled"
    if compute is None:
        return None
    return PlannedLoad(
        caches=tuple(caches), recurrent_bytes=recurrent, compute_bytes=compute, output_bytes=output,
        kv_cache_type=kinds, flash_attention=flash,
    )  # fmt: skip


def _bytes(text: str) -> int:
    return round(float(text) * MIB)
