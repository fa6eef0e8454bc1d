"""llama.cpp's lines, on their own or between Ollama's, and Ollama's markers around them.

Formats: llama.cpp src/llama-model.cpp (``load_tensors``), src/llama-kv-cache.cpp, src/llama-context.cpp (``sched_reserve``),
common/fit.cpp, tools/mtmd/clip.cpp; their history since 2023 in the golden logs. Figures are ``%8.2f MiB``, exact to 0.005 MiB.
"""

from __future__ import annotations

import re
from typing import Final

from harness.core.facts import FitRow, LoadFacts
from harness.logs import ollama_go
from harness.logs.building import Building, Cache, Context, Part
from harness.units import MIB

_NUMBER: Final = r"(\d{1,12}(?:\.\d{1,6})?)"
_BUFFER: Final = re.compile(
    r"(?<![\w~])(?P<where>[\w~]{1,80}):\s+(?P<device>\S{1,80})\s+"
    r"(?P<what>model |KV |RS |compute |output |LoRA |)buffer size\s*=\s*"
    r"(?P<size>\d{1,12}(?:\.\d{1,6})?) Mi?B"
)
_SIZE: Final = re.compile(
    r"size\s*=\s*"
    + _NUMBER
    + r" MiB \(\s*(?P<cells>\d{1,12}) cells,\s*(?P<layers>\d{1,6}) layers,\s*(?P<seqs>\d{1,6})(?:/(?P<streams>\d{1,6}))? seqs"
)
_TYPES: Final = re.compile(r"K \((\w{1,16})\):.{1,40}V \((\w{1,16})\):")
_CREATING: Final = re.compile(r"creating\s+(?P<kind>non-SWA|SWA) KV cache, size = (?P<cells>\d{1,12}) cells")
_VALUE: Final = re.compile(
    r"(?:\bllama_\w{1,60}|\bllm_\w{1,60}|print_info|init|\bsrv\s{1,8}\w{1,60}):\s+(?P<key>n_ctx|n_seq_max|n_ubatch|flash_attn|n_ctx_train)\s*=\s*(?P<value>\w+)"
)
_OFFLOADED: Final = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_FLASH: Final = re.compile(r"Flash Attention (?:was auto, set to )?(enabled|disabled)")
_META: Final = re.compile(
    r"loaded meta data with \d{1,9} key-value pairs and \d{1,9} tensors from (?P<path>.{1,4096}) \(version GGUF"
)
_LOADING: Final = re.compile(r"loading model '(?P<path>[^']+)'")
_ARGUMENT: Final = {
    "model": re.compile(r"--model (?P<value>\"[^\"]+\"|\S+)"),
    "parallel": re.compile(r"(?:-np|--parallel) (?P<value>\d{1,6})"),
    "cells": re.compile(r"(?:\s-c|--ctx-size) (?P<value>\d{1,12})"),
    "batch": re.compile(r"(?:-ub|--ubatch-size) (?P<value>\d{1,9})"),
}
_STARTED: Final = re.compile(r"(?:llama-server|llama runner|runner) started in ([\d.]{1,12}) seconds")
_READY: Final = ("model loaded", "server is listening", "HTTP server is listening")
_ROW: Final = re.compile(
    r"\|\s{1,8}- (?P<device>\S{1,80})[^|]{0,200}\|\s*(?:(?P<total>-?\d{1,12}) =\s*(?P<free>-?\d{1,12}) \+ \(\s*)?"
    r"(?P<self>\d{1,12}) =\s*(?P<model>\d{1,12}) \+\s*(?P<context>\d{1,12}) \+\s*(?P<compute>\d{1,12})"
)
_PROJECTED: Final = re.compile(r"projected to use (\d{1,12}) MiB of (?:device|host) memory vs\. (\d{1,12}) MiB")
_TARGET: Final = re.compile(r"(?:will leave -?\d{1,12} >= |free memory target of )(\d{1,12}) MiB")
_LAYERS: Final = re.compile(r"- (?P<device>\S{1,80})[^:]{0,200}:\s*\d{1,6} layers(?: \(\s*(?P<over>\d{1,6}) overflowing\))?,")
_LAYER: Final = re.compile(r"llama_(?P<what>kv_cache|memory_recurrent)\w{0,20}[:,] layer\s{1,6}(?P<index>\d{1,4}): dev = ")
_PROJECTOR: Final = re.compile(r"load_hparams: model size:\s+" + _NUMBER + " MiB")
_CLIP: Final = re.compile(r"CLIP using (\S+) backend")
_FAILURES: Final = (
    "out of memory",
    "error loading model",
    "unable to allocate",
    "failed to allocate",
    "failed to load model",
    "failed to initialize the context",
    "failed to create context",
    "process has terminated",
    "timed out waiting for llama",
    "startup failed",
    "unable to load model",
    "GGML_ASSERT",
    "Illegal instruction",
)
_PARTS: Final[dict[str, Part]] = {"RS ": "recurrent", "compute ": "compute", "output ": "output"}
_STARTS: Final = (
    'msg="starting llama-server"',
    'msg="starting runner"',
    'msg="starting llama server"',
    "starting llama runner",
)


class LlamaReader:
    """Takes cleaned lines; collects loads."""

    def __init__(self) -> None:
        self._done: list[LoadFacts] = []
        self._load: Building | None = None
        self._ollama = False
        self._version: str | None = None
        self._draft_model = False
        self._overflow: dict[str, int] = {}

    def finish(self) -> list[LoadFacts]:
        """The loads, in order."""
        self._close()
        return self._done

    def feed_line(self, line: str) -> None:
        """Look at one line."""
        if not self._ollama and ("msg=" in line or "ollama[" in line) and ("level=" in line or "ollama[" in line):
            self._ollama = True
        if "msg=" in line or "starting llama runner" in line:
            self._ollama_line(line)
        if "MiB" in line or " MB" in line:
            self._figures(line)
        else:
            self._words(line)

    # -- loads ------------------------------------------------------------------------------------------------------

    def _open(self) -> Building:
        if self._load is None:
            self._load = Building()
            self._draft_model = False
            self._overflow = {}
        return self._load

    def _close(self) -> None:
        load, self._load = self._load, None
        if load is None or not (load.seen or load.failure):
            return
        if load.weights and not any(load.weights.values()):
            load.restart()  # only a fit probe was logged: nothing was allocated
        load.version = self._version
        if self._overflow:
            load.overflowing = sum(self._overflow.values())
        if self._ollama:
            load.engine = "ollama"
            own = bool(load.weights or load.contexts)
            load.dialect = "ollama-llama.cpp" if own or not load.go else "ollama-go"
        facts = load.facts()
        if facts.devices or facts.failed or facts.fit is not None or facts.complete:
            self._done.append(facts)

    def _begin(self, line: str) -> None:
        """A start marker of Ollama: a runner or server for a model."""
        model = _ARGUMENT["model"].search(line)
        if model is None:
            return  # a discovery runner loads nothing
        self._close()
        load = self._open()
        load.model = model["value"].strip('"').rstrip('"')
        for name, attribute in (("parallel", "parallel"), ("cells", "context_cells"), ("batch", "num_batch")):
            if found := _ARGUMENT[name].search(line):
                setattr(load, attribute, int(found["value"]))
        ollama_go.begin(load, line)

    # -- Ollama's own lines -----------------------------------------------------------------------------------------

    def _ollama_line(self, line: str) -> None:
        if any(start in line for start in _STARTS):
            self._begin(line)
            return
        if "Listening on" in line and (version := re.search(r"\(version ([^)\s]{1,40})\)", line)):
            self._version = version[1]
            return
        if started := _STARTED.search(line):
            if self._load is not None:
                self._load.complete, self._load.seconds = True, _seconds(started[1])
            return
        if ollama_go.is_figure(line):
            ollama_go.read(self._open(), line)
            return
        self._failure(line)

    def _failure(self, line: str) -> None:
        load = self._load
        if load is None or load.complete or load.failure is not None or "retrying" in line:
            return
        if any(sign in line for sign in _FAILURES):
            load.failure = " ".join(line.split())[-400:]

    # -- llama.cpp's figures ----------------------------------------------------------------------------------------

    def _figures(self, line: str) -> None:
        matched = False
        for match in _BUFFER.finditer(line):
            matched = True
            self._buffer(match)
        if "cells" in line and (size := _SIZE.search(line)):
            self._cache_size(size, line)
        elif "K (" in line and (types := _TYPES.search(line)):
            self._open().kv_types = (types[1], types[2])
        if matched:
            return
        if "breakdown" in line or "projected" in line or "will leave" in line or "target of" in line or "MiB used" in line:
            self._fit(line)
        elif projector := _PROJECTOR.search(line):
            load = self._open()
            load.projector[load.projector_device or "CPU"] = _bytes(projector[1])
        else:
            self._failure(line)

    def _buffer(self, match: re.Match[str]) -> None:
        where, what, size = match["where"], match["what"], _bytes(match["size"])
        if where.startswith("~"):
            return  # a destructor's report
        device = device_name(match["device"])
        load = self._open()
        load.seen = True
        if "load_tensors" in where or what == "model ":
            self._weights(load, device, size)
        elif what == "KV ":
            cache = self._cache(load, device)
            cache.devices[device] = size
        elif what == "LoRA ":
            load.lora[device] = size
        elif "compute_meta" in where:
            load.projector_compute[device] = size
        elif what in _PARTS:
            load.context.parts[device, _PARTS[what]] = size

    def _weights(self, load: Building, device: str, size: int) -> None:
        if self._draft_model:
            load.weights[device] = load.weights.get(device, 0) + size
            return
        if load.complete:
            self._close()
            load = self._open()
            load.seen = True
        if load.contexts:
            load.restart()  # a new pass: what came before was a fit probe or a try that failed
        load.weights[device] = size

    def _cache(self, load: Building, device: str) -> Cache:
        caches = load.context.caches
        if not caches or caches[-1].sized or device in caches[-1].devices:
            caches.append(Cache())
        return caches[-1]

    def _cache_size(self, match: re.Match[str], line: str) -> None:
        if "K (" not in line:
            return  # recurrent state
        load = self._open()
        caches = load.context.caches
        if not caches:
            caches.append(Cache())
        cache = caches[-1]
        cache.cells, cache.layers, cache.sized = int(match["cells"]), int(match["layers"]), True
        cache.streams = int(match["streams"] or 1)
        types = _TYPES.search(line)
        if types and not load.context.draft:
            load.kv_types = (types[1], types[2])

    def _fit(self, line: str) -> None:
        load = self._open()
        if load.complete:
            return  # the table is printed again at exit
        if "memory breakdown [MiB]" in line:
            load.fit_rows = []
        elif row := _ROW.search(line):
            load.fit_rows.append(_fit_row(row))
        elif projected := _PROJECTED.search(line):
            load.projected, load.free = int(projected[1]) * MIB, int(projected[2]) * MIB
        elif layers := _LAYERS.search(line):
            self._overflow[layers["device"]] = int(layers["over"] or 0)
        if target := _TARGET.search(line):
            load.target = int(target[1]) * MIB
            if "no changes needed" in line:
                load.overflowing = 0

    # -- llama.cpp's words ------------------------------------------------------------------------------------------

    def _words(self, line: str) -> None:
        if value := _VALUE.search(line):
            self._setting(value["key"], value["value"])
        elif "KV cache, size" in line and (creating := _CREATING.search(line)):
            cells, window = int(creating["cells"]), creating["kind"] == "SWA"
            self._open().context.caches.append(Cache(cells, window))
        elif offloaded := _OFFLOADED.search(line):
            self._layers(int(offloaded[1]), int(offloaded[2]))
        elif "Flash Attention" in line:
            self._flash(line)
        elif "constructing llama_context" in line or "creating MTP draft context" in line or "loading draft model" in line:
            self._context(line)
        elif meta := _META.search(line) or _LOADING.search(line):
            self._model(meta["path"])
        elif clip := _CLIP.search(line):
            load = self._open()
            load.projector.clear()
            load.projector_compute.clear()
            load.projector_device = device_name(clip[1])
        elif "graph splits = " in line and self._load is not None and "compute_meta" not in line:
            number = re.search(r"graph splits = (\d{1,9})", line)
            self._load.graph_splits = int(number[1]) if number else None
        elif "memory_breakdown_print" in line:
            self._fit(line)
        elif ": dev = " in line and (layer := _LAYER.search(line)):
            self._kind(int(layer["index"]), recurrent=layer["what"] == "memory_recurrent")
        elif any(ready in line for ready in _READY):
            if self._load is not None:
                self._load.complete = True
        else:
            self._failure(line)

    def _kind(self, index: int, *, recurrent: bool) -> None:
        """A layer has a place in a cache (``-lv 5``)."""
        load = self._open()
        if load.context.draft:
            return
        caches = load.context.caches
        new = "r" if recurrent else "w" if caches and caches[-1].window else "f"
        old = load.layer_kinds.get(index, new)
        load.layer_kinds[index] = new if old == new else "b" if "r" in old + new else "f"

    def _layers(self, offloaded: int, total: int) -> None:
        if self._draft_model:
            return
        if self._load is not None and self._load.complete:
            self._close()  # the next load of a log without markers
        self._open().offloaded = (offloaded, total)

    def _setting(self, key: str, value: str) -> None:
        load = self._open()
        if key == "flash_attn":
            load.flash = {"0": "disabled", "disabled": "disabled", "1": "enabled", "enabled": "enabled"}.get(value)  # type: ignore[assignment]
        elif not (value.isdecimal() and len(value) <= 12):
            return
        elif key == "n_ctx_train":
            load.train_context = load.train_context or int(value)
        elif load.contexts and load.context.draft:
            return
        elif key == "n_ctx":
            load.context_cells = int(value)
        elif key == "n_seq_max":
            load.parallel = int(value)
        elif key == "n_ubatch":
            load.num_batch = int(value)

    def _flash(self, line: str) -> None:
        if found := _FLASH.search(line):
            self._open().flash = found[1]  # type: ignore[assignment]
        elif "Flash Attention is assigned to device" in line:
            self._open().flash = "disabled"

    def _context(self, line: str) -> None:
        load = self._open()
        if "draft" in line:
            self._draft_model = True
            load.contexts.append(Context(draft=True))
        elif not load.contexts or load.context.parts or load.context.caches:
            load.contexts.append(Context(draft=self._draft_model))

    def _model(self, path: str) -> None:
        if self._load is not None and self._load.complete and not self._draft_model:
            self._close()
        load = self._open()
        if not self._draft_model:
            load.model = load.model or path


def device_name(name: str) -> str:
    """The device of a buffer type: an RPC device without its address, a Metal buffer without its mapping."""
    short = name.split("[", 1)[0] or name
    for suffix in ("_Mapped", "_Private"):
        if short.endswith(suffix) and short.startswith(("MTL", "Metal")):
            return short.removesuffix(suffix)
    return short


def _bytes(mib: str) -> int:
    return round(float(mib) * MIB)


def _seconds(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _fit_row(row: re.Match[str]) -> FitRow:
    def size(name: str) -> int | None:
        return None if row[name] is None else int(row[name]) * MIB

    return FitRow(
        device=device_name(row["device"]),
        total_bytes=size("total"),
        free_bytes=size("free"),
        self_bytes=size("self") or 0,
        model_bytes=size("model") or 0,
        context_bytes=size("context") or 0,
        compute_bytes=size("compute") or 0,
    )
