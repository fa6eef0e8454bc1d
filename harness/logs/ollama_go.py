"""Ollama's Go engine (0.6 - 0.24): sizes rounded to a tenth of their unit, or exact bytes at DEBUG.

Sources in ollama/ollama: ml/device.go and ml/backend.go (``model weights``, ``kv cache``, ``compute graph``),
runner/ollamarunner (``msg=load request``). Between 0.12.11 and 0.24 the llama.cpp runner prints the same lines *before* it
starts: estimates.
"""

from __future__ import annotations

import re
from typing import Final

from harness.logs.building import Building
from harness.logs.oldest import Part
from harness.logs.parts import MANY
from harness.logs.slog import human_bytes, pairs

_PARTS: Final[dict[str, Part]] = {"model weights": "weights", "kv cache": "kv_cache", "compute graph": "compute"}
_OFFLOADED: Final = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_FIELD: Final = re.compile(r"(\w{1,40}):(\S*+)")
#: ``required`` since 0.11.5 (0.11.5 - 0.12.3 with a letter behind each number), ``allocated`` in 0.7.1 - 0.11.4.
_EXACT: Final = re.compile(r"^(?:required|allocated)\.(?:(?P<device>[^.]{1,80})\.(?P<part>Weights|Cache|Graph)|InputWeights)$")
_EXACT_PARTS: Final[dict[str, Part]] = {"Weights": "weights", "Cache": "kv_cache", "Graph": "compute"}
_DIGITS: Final = re.compile(r"(?<!\d)(\d{1,18})(?:A|U)?(?![\dF])")


def opens_load(line: str) -> bool:
    """Whether such a line can only stand in a load that is still under way."""
    return '"model weights"' in line or ("msg=load " in line and "Operation:close" not in line)


def read(load: Building, line: str) -> None:
    """Take one such line."""
    fields = pairs(line)
    message = fields.get("msg", "")
    if message == "load":
        _request(load, fields.get("request", ""))
    elif message == "memory":
        _exact(load, fields)
    elif "does not support caching" in message:
        _uncached(load, fields.get("batch_size", ""))
    elif message in _PARTS:
        _figure(load, _PARTS[message], fields)
    elif offloaded := _OFFLOADED.search(message):
        load.offloaded = (int(offloaded[1]), int(offloaded[2]))
        load.go_engine, load.estimated = True, False  # llama.cpp says this in a line of its own
    elif message == "starting go runner":
        load.go_engine, load.llama_engine = False, True
        load.estimated = True  # what came before was no measurement
    elif message == "starting ollama engine":
        load.go_engine, load.estimated = True, False


def _request(load: Building, text: str) -> None:
    values = dict(_FIELD.findall(text.strip("{}")))
    operation = values.get("Operation", "")
    if operation not in ("fit", "alloc", "commit"):
        return
    load.failure = None  # a layout that could not be allocated is followed by a smaller one
    if not load.go and not load.own:
        load.go_engine = True  # a runner that is asked first and answers with figures measures
    load.seen = True
    for key, attribute in (("KvSize", "context_cells"), ("Parallel", "parallel"), ("BatchSize", "num_batch")):
        value = values.get(key, "")
        if value.isdecimal() and len(value) <= 12:
            setattr(load, attribute, int(value) or None)
    if "KvCacheType" in values:
        kind = values["KvCacheType"][:16] or "f16"
        load.kv_types = (kind, kind)
    flash = values.get("FlashAttention", "").lower()
    if flash in ("enabled", "true"):
        load.flash = "enabled"
    elif flash in ("disabled", "false"):
        load.flash = "disabled"


def _uncached(load: Building, batch: str) -> None:
    """A model of embeddings has no KV cache, and its context for a batch (0.11.5 - 0.24, runner/ollamarunner)."""
    load.go_uncached = True
    if batch.isdecimal() and len(batch) <= 12:
        load.num_batch = int(batch) or None


def _figure(load: Building, part: Part, fields: dict[str, str]) -> None:
    device = fields.get("device") or fields.get("buffer") or fields.get("buffer_type") or fields.get("backend")
    size = human_bytes(fields.get("size", ""))
    if device is None or size is None:
        return
    load.seen = True
    if part == "weights" and load.go_last not in (None, "weights"):
        load.go.clear()  # the table is printed again: another layout, or another attempt
    load.go_last = part
    if "buffer" in fields or "backend" in fields or fields.get("level") == "DEBUG":
        load.go_engine = True  # before 0.11.5 it estimates in other words, and never at DEBUG
    if size[0] and len(load.go) < MANY:  # "0 B" is printed before anything is reserved
        load.go[device, part] = size
        load.estimated = not load.go_engine
        if load.go_uncached and part == "weights":
            load.go[device, "kv_cache"] = (0, 0)


def _exact(load: Building, fields: dict[str, str]) -> None:
    """``required.CUDA0.Cache="[n n …]"`` at DEBUG: bytes by layer; the last successful one is what was allocated."""
    found: dict[tuple[str, Part], int] = {}
    for key, value in fields.items():
        if (match := _EXACT.match(key)) and len(found) < MANY:
            # Input embeddings always lie on the CPU and have no layer.
            where: tuple[str, Part] = ("CPU", "weights")
            if match["part"]:
                where = (match["device"], _EXACT_PARTS[match["part"]])
            found[where] = found.get(where, 0) + sum(int(number) for number in _DIGITS.findall(value))
    if not found or fields.get("success", "true") != "true":
        return
    load.seen = True
    load.go_engine, load.estimated = True, False
    load.go_exact = found
