"""What llama.cpp says that it allocated, line by line, into the load under way.

Formats: llama.cpp src/llama-model.cpp (``load_tensors``), src/llama-kv-cache.cpp, src/llama-context.cpp (``sched_reserve``),
tools/mtmd/clip.cpp; their history since 2023 in docs/reference/parse.md. Figures are ``%8.2f MiB``, exact to 0.005 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from harness.logs.building import Building
from harness.logs.numbers import COUNT, SIZE, count, mib
from harness.logs.oldest import Part
from harness.logs.parts import MANY, MANY_LINES, Cache, LoggedModel, Projector
from harness.model.facts import device_kind

BUFFER: Final = re.compile(
    r"(?<![\w~])(?P<where>[\w~]{1,80}):\s{1,80}(?P<device>\S{1,80}(?<!:)(?: [^\s=:]{1,80}){0,8}?)\s{1,80}"
    r"(?P<what>model |KV |RS |compute |output |LoRA |DSV4 \w{1,16} state |)buffer size\s{0,8}=\s{0,16}" + SIZE + " Mi?B"
)
TOTAL: Final = re.compile(
    r"size\s{0,8}=\s{0,16}" + SIZE + r" MiB \(\s{0,16}" + COUNT + r" cells,\s{0,16}" + COUNT + r" layers?,"
    r"\s{0,16}(?P<seqs>\d{1,6})(?:/\s{0,8}(?P<streams>\d{1,6}))? seqs"
)
_SELF: Final = re.compile(r"KV self size\s{0,8}=\s{0,16}" + SIZE + " MiB")
_HALF: Final = re.compile(r"\b(?P<half>K|V|c\^KV|kv\^T|kv) \((?P<type>\w{1,16})\):\s{0,16}" + SIZE + " MiB")
_TYPES_ONLY: Final = re.compile(r"type_k = '(\w{1,16})', type_v = '(\w{1,16})'")
_CREATING: Final = re.compile(r"creating\s{1,16}(?P<kind>[\w -]{0,40}?)\s?KV cache, size = " + COUNT + " cells")
_VALUE: Final = re.compile(
    r"(?<![\w.-])(?P<key>n_ctx|n_seq_max|n_ubatch|flash_attn|n_ctx_train|kv_size)\s{0,24}=\s{0,16}(?P<value>\w[\w,]{0,40})(?P<end>\s*$)?"
)
_FLASH: Final = re.compile(r"Flash Attention (?:was auto, set to )?(enabled|disabled)")
_LAYER: Final = re.compile(r"llama_(?P<what>kv_cache|memory_recurrent)\w{0,20}[:,] layer\s{1,6}(?P<index>\d{1,4}): dev = ")
_CLIP_SIZE: Final = re.compile(r"(?:load_hparams|clip_model_load\w{0,8}): model size:\s{0,16}" + SIZE + " Mi?B")
_CLIP_COMPUTE: Final = re.compile(r"compute allocated memory: " + SIZE + " Mi?B")
_CLIP: Final = re.compile(r"CLIP using (\S{1,80}) backend")
_OVERRIDDEN: Final = re.compile(r"[Tt]ensor (\S{1,200}) .{0,80}?buffer type overridd?en to (\S{1,80})")
_COPIES: Final = re.compile(r"(?:sched copies = |n_copies=)(\d{1,6})")
_PARTS: Final[dict[str, Part]] = {"RS ": "recurrent", "compute ": "compute", "output ": "output"}
_FLAGS: Final = {"0": "disabled", "disabled": "disabled", "1": "enabled", "enabled": "enabled"}


def named(line: str) -> Iterator[re.Match[str]]:
    """The buffers that a line names; words before an unknown kind of buffer are no device."""
    for match in BUFFER.finditer(line):
        if " " not in match["device"] or match["what"] or "load_tensors" in match["where"]:
            yield match


def buffer(load: Building, match: re.Match[str]) -> None:
    """A buffer of any kind but weights (``BUFFER``)."""
    where, what, size = match["where"], match["what"], mib(match[4])
    if where.startswith("~") or not what:
        return  # a destructor's report, or a buffer of something else
    load.lines += 1
    if load.lines > MANY_LINES:
        return
    device, model = load.device(match["device"]), load.current
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
        what = "RS " if what.startswith("DSV4") else what  # src/llama-kv-cache-dsv4.cpp: state that no context makes longer
        parts, place = model.context.parts, (device, _PARTS[what])
        if place in parts or len(parts) < MANY:
            # A compute buffer that is reserved again replaces; recurrent state is reserved once, so that a second one adds.
            parts[place] = size + (parts.get(place, 0) if what == "RS " else 0)


def sizes(load: Building, line: str) -> bool:
    """The size of a cache, or of a projector; whether the line was one of ours."""
    if found := TOTAL.search(line):
        if "K (" in line or "KV (" in line:
            _cache_size(load, found, line)  # recurrent state has its own line per device
    elif (found := _SELF.search(line)) and (halves := list(_HALF.finditer(line))):
        load.current.context.kv_total, load.seen = mib(found[1]), True
        load.kv_types = (halves[0]["type"], halves[-1]["type"])
    elif clip := _CLIP_SIZE.search(line):
        projector(load).weights = mib(clip[1])
    elif clip := _CLIP_COMPUTE.search(line):
        encoder = projector(load)
        encoder.compute[encoder.device] = mib(clip[1])
    else:
        return False
    return True


def _cache_size(load: Building, match: re.Match[str], line: str) -> None:
    caches = load.current.context.caches
    if not caches or caches[-1].sized:
        if len(caches) >= MANY:
            return
        caches.append(Cache())
    cache = caches[-1]
    load.seen = True
    cache.total, cache.cells, cache.layers, cache.sized = mib(match[1]), count(match[2]), count(match[3]), True
    cache.slots, cache.streams = int(match["seqs"]), int(match["streams"] or 1) or 1
    if halves := list(_HALF.finditer(line)):
        cache.types = (halves[0]["type"], halves[-1]["type"])
        if len(halves) == 2:
            cache.halves = (mib(halves[0][3]), mib(halves[1][3]))


def creating(load: Building, line: str) -> bool:
    """A cache of a kind is announced; its buffers follow."""
    found = _CREATING.search(line)
    load.lines += 1
    if found and len(load.current.context.caches) < MANY and load.lines <= MANY_LINES:
        load.current.context.caches.append(Cache(count(found[2]), found["kind"] == "SWA"))
    return found is not None


def overridden(load: Building, line: str) -> bool:
    """A tensor is put elsewhere by choice; what counts is what goes to the host."""
    found = _OVERRIDDEN.search(line)
    tensors = load.current.overridden
    if found and device_kind(found[2]) == "host" and len(tensors) < MANY_LINES:
        tensors.add(found[1])
    return found is not None


def copies(load: Building, line: str) -> bool:
    """How many copies of its inputs the scheduler keeps: four with pipeline parallelism."""
    if (found := _COPIES.search(line)) and not _is_draft(load.current):
        load.sched_copies = int(found[1])
    elif "pipeline parallelism enabled" in line and load.sched_copies is None:
        load.sched_copies = 4  # GGML_SCHED_MAX_COPIES, a constant of ggml-backend.cpp
    elif "retrying without pipeline parallelism" in line:
        load.sched_copies, load.failure = 1, None
    return True


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
        load.projectors.append(Projector(load.device(found[1])))
    return found is not None


def projector(load: Building) -> Projector:
    """The encoder whose lines are coming."""
    if not load.projectors:
        load.projectors.append(Projector("CPU"))
    return load.projectors[-1]


def setting(load: Building, line: str, *, cut: bool = False) -> bool:
    """``key = value`` of a model or context; whether the line was one. ``cut``: it may lack its end, and so may its number."""
    if types := _TYPES_ONLY.search(line):
        load.kv_types = (types[1], types[2])
    taken = types is not None
    for found in _VALUE.finditer(line):
        taken = True
        if not (cut and found["end"] is not None):
            _set(load, found["key"], found["value"].rstrip(","))
    return taken


def _set(load: Building, key: str, value: str) -> None:
    model = load.current
    if key == "n_ctx_train":
        load.train_context = load.train_context or _count(value)
    elif _is_draft(model):
        return
    elif key == "flash_attn":
        load.flash, load.flash_said = _FLAGS.get(value), True  # type: ignore[assignment]
    elif key == "kv_size":
        load.context_cells = load.context_cells or _count(value)
    elif key == "n_ctx":
        load.context_cells = _count(value)
    elif key == "n_seq_max":
        load.parallel = _count(value)
    else:
        load.num_batch = _count(value)


def flash(load: Building, line: str) -> None:
    """What became of flash attention that was left to the engine."""
    if _is_draft(load.current):
        return
    if found := _FLASH.search(line):
        load.flash = found[1]  # type: ignore[assignment]
    elif "Flash Attention is assigned to device" in line:
        load.flash = "disabled"


def _is_draft(model: LoggedModel) -> bool:
    return model.draft or (bool(model.contexts) and model.contexts[-1].draft)


def add(sizes: dict[str, int], device: str, size: int) -> None:
    """Add to what a device has."""
    if device in sizes or len(sizes) < MANY:
        sizes[device] = sizes.get(device, 0) + size


def _count(text: str) -> int | None:
    return count(text) if re.fullmatch(COUNT, text, re.ASCII) else None
