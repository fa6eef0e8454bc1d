"""Ollama's Go engine (0.6 - 0.24): sizes rounded to a tenth of their unit, or exact bytes at DEBUG.

Sources in ollama/ollama: ml/device.go and ml/backend.go (``model weights``, ``kv cache``, ``compute graph``),
runner/ollamarunner (``msg=load request``). Between 0.12.11 and 0.24 the llama.cpp runner prints the same lines *before* it
starts: estimates.
"""

from __future__ import annotations

import re
from typing import Final

from harness.logs.building import Building, Part
from harness.logs.slog import human_bytes, pairs

_PARTS: Final[dict[str, Part]] = {"model weights": "weights", "kv cache": "kv_cache", "compute graph": "compute"}
_OFFLOADED: Final = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_FIELD: Final = re.compile(r"(\w+):(\S*)")
_EXACT: Final = re.compile(r"^required\.(?P<device>[^.]+)\.(?P<part>Weights|Cache|Graph)$")
_EXACT_PARTS: Final[dict[str, Part]] = {"Weights": "weights", "Cache": "kv_cache", "Graph": "compute"}
_DIGITS: Final = re.compile(r"\d{1,18}")


def begin(load: Building, line: str) -> None:
    """A runner starts; only the Go engine's own device lines will be measurements."""
    load.estimated = False
    load.go_measured = "--ollama-engine" in line


def is_figure(line: str) -> bool:
    """Whether a slog line is one of the Go engine's."""
    return (
        'msg="model weights"' in line
        or 'msg="kv cache"' in line
        or 'msg="compute graph"' in line
        or "msg=load request=" in line
        or "msg=memory success=" in line
        or "layers to GPU" in line
    )


def read(load: Building, line: str) -> None:
    """Take one such line."""
    fields = pairs(line)
    message = fields.get("msg", "")
    if message == "load":
        _request(load, fields.get("request", ""))
    elif message == "memory":
        _exact(load, fields)
    elif message in _PARTS:
        _figure(load, _PARTS[message], fields)
    elif offloaded := _OFFLOADED.search(message):
        load.offloaded = (int(offloaded[1]), int(offloaded[2]))


def _request(load: Building, text: str) -> None:
    values = dict(_FIELD.findall(text.strip("{}")))
    operation = values.get("Operation", "")
    if operation == "close":
        return
    if not load.go:
        load.go_measured = True  # device lines before any request of the load are estimates
    load.seen = True
    for key, attribute in (("KvSize", "context_cells"), ("Parallel", "parallel"), ("BatchSize", "num_batch")):
        value = values.get(key, "")
        if value.isdecimal() and len(value) <= 12:
            setattr(load, attribute, int(value))
    if "KvCacheType" in values:
        load.kv_type = values["KvCacheType"] or "f16"
    flash = values.get("FlashAttention", "").lower()
    if flash in ("enabled", "true"):
        load.flash = "enabled"
    elif flash in ("disabled", "false"):
        load.flash = "disabled"


def _figure(load: Building, part: Part, fields: dict[str, str]) -> None:
    device = fields.get("device") or fields.get("buffer") or fields.get("buffer_type") or fields.get("backend")
    size = human_bytes(fields.get("size", ""))
    if device is None or size is None:
        return
    load.seen = True
    if "buffer" in fields or "backend" in fields:
        load.go_measured = True  # the Go engine before 0.11.5, which estimates in other words
    if (device, part) in load.go_exact or size[0] == 0:
        return  # "0 B" is printed before anything is reserved
    load.go[device, part] = size[0]
    load.uncertainty = max(load.uncertainty, size[1])
    load.estimated = not load.go_measured


def _exact(load: Building, fields: dict[str, str]) -> None:
    """``required.CUDA0.Cache="[n n …]"`` at DEBUG: bytes by layer; the last successful one is what was allocated."""
    if fields.get("success") != "true":
        return
    load.seen = True
    for key, value in fields.items():
        if match := _EXACT.match(key):
            where = (match["device"], _EXACT_PARTS[match["part"]])
            load.go[where] = sum(int(number) for number in _DIGITS.findall(value))
            load.go_exact.add(where)
    load.uncertainty = 0
    load.estimated = False
