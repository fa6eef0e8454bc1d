"""What llama.cpp says that it allocated, line by line, into the load under way.

Formats: llama.cpp src/llama-model.cpp (``load_tensors``), src/llama-kv-cache.cpp, src/llama-context.cpp (``sched_reserve``),
tools/mtmd/clip.cpp; their history since 2023 in docs/reference/parse.md. Figures are ``%8.2f MiB``, exact to 0.005 MiB.
"""

from __future__ import annotations

import re
from typing import Final

from harness.logs import oldest
from harness.logs.building import MANY, MANY_LINES, Building, Cache, Model, Projector
from harness.logs.oldest import Part
from harness.units import MIB

_NUMBER: Final = r"(\d{1,12}(?:\.\d{1,6})?)"
BUFFER: Final = re.compile(
    r"(?<![\w~])(?P<where>[\w~]{1,80}):\s{1,80}(?P<device>\S{1,80})\s{1,80}"
    r"(?P<what>model |KV |RS |compute |output |LoRA |)buffer size\s{0,8}=\s{0,16}"
    r"(?P<size>\d{1,12}(?:\.\d{1,6})?) Mi?B"
)
_SIZE: Final = re.compile(
    r"size\s{0,8}=\s{0,16}"
    + _NUMBER
    + r" MiB \(\s{0,16}(?P<cells>\d{1,12}) cells,\s{0,16}(?P<layers>\d{1,6}) layers?,"
    + r"\s{0,16}(?P<seqs>\d{1,6})(?:/(?P<streams>\d{1,6}))? seqs"
)
_TYPES: Final = re.compile(r"K \((\w{1,16})\):.{1,40}V \((\w{1,16})\):")
_TYPES_ONLY: Final = re.compile(r"type_k = '(\w{1,16})', type_v = '(\w{1,16})'")
_CREATING: Final = re.compile(r"creating\s{1,16}(?P<kind>[\w -]{0,40}?)\s?KV cache, size = (?P<cells>\d{1,12}) cells")
_VALUE: Final = re.compile(
    r"(?:\bllama_\w{1,60}|\bllm_\w{1,60}|print_info|\binit):\s{1,16}"
    r"(?P<key>n_ctx|n_seq_max|n_ubatch|flash_attn|n_ctx_train)\s{0,16}=\s{0,16}(?P<value>\w{1,40})"
)
_FLASH: Final = re.compile(r"Flash Attention (?:was auto, set to )?(enabled|disabled)")
_LAYER: Final = re.compile(r"llama_(?P<what>kv_cache|memory_recurrent)\w{0,20}[:,] layer\s{1,6}(?P<index>\d{1,4}): dev = ")
_CLIP_SIZE: Final = re.compile(r"(?:load_hparams|clip_model_load\w{0,8}): model size:\s{0,16}" + _NUMBER + " Mi?B")
_CLIP_COMPUTE: Final = re.compile(r"compute allocated memory: " + _NUMBER + " Mi?B")
_CLIP: Final = re.compile(r"CLIP using (\S{1,80}) backend")
_PARTS: Final[dict[str, Part]] = {"RS ": "recurrent", "compute ": "compute", "output ": "output"}
_FLAGS: Final = {"0": "disabled", "disabled": "disabled", "1": "enabled", "enabled": "enabled"}


def buffer(load: Building, match: re.Match[str]) -> None:
    """A buffer of any kind but weights (``BUFFER``)."""
    where, what, size = match["where"], match["what"], mib(match["size"])
    if where.startswith("~") or not what:
        return  # a destructor's report, or a buffer of something else
    load.lines += 1
    if load.lines > MANY_LINES:
        return
    device, model = device_name(match["device"]), load.current
    load.seen = True
    if what == "KV ":
        caches = model.context.caches
        if not caches or caches[-1].sized or device in caches[-1].devices:
            if len(caches) >= MANY:
                return
            caches.append(Cache())
        add(caches[-1].devices, device, size)
    elif what == "LoRA ":
        add(model.lora, device, size)
    elif "compute_meta" in where:
        projector(load).compute[device] = size
    else:
        parts, place = model.context.parts, (device, _PARTS[what])
        if place in parts or len(parts) < MANY:
            # A compute buffer that is reserved again replaces; recurrent state is reserved once, so that a second one adds.
            parts[place] = size + (parts.get(place, 0) if what == "RS " else 0)


def sizes(load: Building, line: str) -> bool:
    """A line with a size that is no buffer's; whether it was one of ours."""
    if "cells" in line and (size := _SIZE.search(line)):
        _cache_size(load, size, line)
    elif oldest.is_oldest(line):
        load.oldest_device = oldest.read(load.oldest, line) or load.oldest_device
        load.seen = load.seen or bool(load.oldest)
        if types := _TYPES.search(line):
            load.kv_types = (types[1], types[2])
    elif clip := _CLIP_SIZE.search(line):
        projector(load).weights = mib(clip[1])
    elif clip := _CLIP_COMPUTE.search(line):
        encoder = projector(load)
        encoder.compute[encoder.device] = mib(clip[1])
    elif "[mtmd] estimated" in line:
        load.projectors.clear()  # it was measured without being loaded
    else:
        return False
    return True


def _cache_size(load: Building, match: re.Match[str], line: str) -> None:
    if "K (" not in line:
        return  # recurrent state
    caches = load.current.context.caches
    if not caches:
        caches.append(Cache())
    cache = caches[-1]
    cache.cells, cache.layers, cache.sized = int(match["cells"]), int(match["layers"]), True
    cache.slots, cache.streams = int(match["seqs"]), int(match["streams"] or 1) or 1
    if types := _TYPES.search(line):
        cache.types = (types[1], types[2])


def creating(load: Building, line: str) -> bool:
    """A cache of a kind is announced; its buffers follow."""
    found = _CREATING.search(line)
    load.lines += 1
    if found and len(load.current.context.caches) < MANY and load.lines <= MANY_LINES:
        load.current.context.caches.append(Cache(int(found["cells"]), found["kind"] == "SWA"))
    return found is not None


def layer(load: Building, line: str) -> bool:
    """A layer has a place in a cache (``-lv 5``)."""
    found = _LAYER.search(line)
    if found is None or _is_draft(load.current):
        return found is not None
    caches = load.current.context.caches
    recurrent = found["what"] == "memory_recurrent"
    new = "r" if recurrent else "w" if caches and caches[-1].window else "f"
    old = load.layer_kinds.get(int(found["index"]), new)
    load.layer_kinds[int(found["index"])] = new if old == new else "b" if "r" in old + new else "f"
    return True


def clip(load: Building, line: str) -> bool:
    """An encoder is made; the lines that follow are its own."""
    found = _CLIP.search(line)
    if found and len(load.projectors) < MANY:
        load.projectors.append(Projector(device_name(found[1])))
    return found is not None


def projector(load: Building) -> Projector:
    """The encoder whose lines are coming."""
    if not load.projectors:
        load.projectors.append(Projector("CPU"))
    return load.projectors[-1]


def setting(load: Building, line: str) -> bool:
    """``key = value`` of a model or context; whether the line was one."""
    if "type_k" in line and (types := _TYPES_ONLY.search(line)):
        load.kv_types = (types[1], types[2])
        return True
    if "n_" not in line and "flash_attn" not in line:
        return False
    found = _VALUE.search(line)
    if found is None:
        return False
    key, value = found["key"], found["value"]
    model = load.current
    if key == "n_ctx_train":
        load.train_context = load.train_context or _count(value)
        return True
    if key in ("n_ctx", "n_seq_max") and model.contexts and model.contexts[-1].used:
        model.new_context(model.draft)
    if _is_draft(model):
        return True
    if key == "flash_attn":
        load.flash, load.flash_said = _FLAGS.get(value), True  # type: ignore[assignment]
    elif key == "n_ctx":
        load.context_cells = _count(value)
    elif key == "n_seq_max":
        load.parallel = _count(value)
    else:
        load.num_batch = _count(value)
    return True


def flash(load: Building, line: str) -> None:
    """What became of flash attention that was left to the engine."""
    if _is_draft(load.current):
        return
    if found := _FLASH.search(line):
        load.flash = found[1]  # type: ignore[assignment]
    elif "Flash Attention is assigned to device" in line:
        load.flash = "disabled"


def _is_draft(model: Model) -> bool:
    return model.draft or (bool(model.contexts) and model.contexts[-1].draft)


def device_name(name: str) -> str:
    """The device of a buffer type: ``RPC0`` without its address, a Metal buffer without its mapping.

    Before 2025-10 an RPC device was named by its address alone (``RPC[host:port]``), which is kept.
    """
    short, bracket, _ = name.partition("[")
    if bracket and (not short or not short[-1].isdigit()):
        return name
    for suffix in ("_Mapped", "_Private"):
        if short.endswith(suffix) and short.startswith(("MTL", "Metal")):
            return short.removesuffix(suffix)
    return short


def add(sizes: dict[str, int], device: str, size: int) -> None:
    """Add to what a device has."""
    if device in sizes or len(sizes) < MANY:
        sizes[device] = sizes.get(device, 0) + size


def mib(text: str) -> int:
    """Bytes of a figure in MiB."""
    return round(float(text) * MIB)


def _count(text: str) -> int | None:
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 12 else None
