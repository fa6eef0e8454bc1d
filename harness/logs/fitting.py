"""llama.cpp's projection before a load (``common_params_fit_impl``, common/fit.cpp; ``llama_params_fit_impl`` before 2026-04).

Integer MiB, truncated. A projection is no allocation: its rows never become devices of a load.
"""

from __future__ import annotations

import re
from typing import Any, Final

from harness.logs.building import Building
from harness.logs.parts import MANY
from harness.model.facts import FitRow
from harness.units import MIB

#: A row may have lost what stands before the device's name; ``RPC0 (host:port)`` says where it listens.
_ROW: Final = re.compile(
    r"(?<![\w.-])(?P<device>[A-Z][\w-]{1,80}(?:\(\))?)(?: \((?P<what>[^|]{0,200})\))?\s{0,200}\|\s{0,200}"
    r"(?:(?P<total>-?\d{1,12}) = {0,8}(?P<free>-?\d{1,12}) \+ \( {0,8})?"
    r"(?P<self>\d{1,12}) = {0,8}(?P<model>\d{1,12}) \+ {0,8}(?P<context>\d{1,12}) \+ {0,8}(?P<compute>\d{1,12})"
)
_PROJECTED: Final = re.compile(r"projected to use (\d{1,12}) MiB of (?:device|host) memory vs\. (\d{1,12}) MiB")
_TARGET: Final = re.compile(r"(?:will leave -?\d{1,12} >= |free memory target of )(\d{1,12}) MiB")
_LAYERS: Final = re.compile(
    r"(?P<device>[A-Z]\w{1,80}) .{0,200}?:\s*\d{1,6} layers"
    r"(?: \(\s*(?P<over>\d{1,6}) overflowing\))?,\s*(?:(?P<used>\d{1,12}) MiB used)?"
)
_USED: Final = re.compile(r"(?P<device>[A-Z]\w{1,80}) .{0,200}?:\s*\d{1,12} total,\s*(?P<used>\d{1,12}) used,")
_ADDRESS: Final = re.compile(r"\S{1,200}:\d{1,5}")


def read(load: Building, line: str) -> bool:
    """Take a line of the projection, or of the table that an engine prints when it ends; whether it was one."""
    taken = False
    if "memory breakdown [MiB]" in line:
        _table(load)
        taken = True
    for row in _ROW.finditer(line) if "|" in line else ():
        taken = True
        size = {
            name: int(row[name]) * MIB if row[name] else None
            for name in ("total", "free", "self", "model", "context", "compute")
        }
        _take(load, row["device"], row["what"] or "", size)
    if load.complete:
        return taken
    if "MiB" not in line and " used," not in line and "no changes" not in line:
        return taken
    if projected := _PROJECTED.search(line):
        load.projected, load.free = int(projected[1]) * MIB, int(projected[2]) * MIB
        load.overflow, load.nothing_overflows = {}, False
    for layers in (*_LAYERS.finditer(line), *_USED.finditer(line)) if " used" in line or " layers" in line else ():
        taken = True
        if len(load.overflow) < MANY and len(load.fit_used) < MANY:
            if "over" in layers.re.groupindex:
                load.overflow[layers["device"]] = int(layers["over"] or 0)
            if layers["used"]:
                load.fit_used[layers["device"]] = int(layers["used"]) * MIB
    if target := _TARGET.search(line):
        load.target = int(target[1]) * MIB
    if target or "no changes needed" in line:
        load.nothing_overflows = "no changes needed" in line
        load.fit_done = True
    return taken or projected is not None or target is not None


def record(load: Building, data: dict[str, Any]) -> bool:
    """The same table of ``--log-jsonl`` (``fit_memory_breakdown``, common/fit.cpp, since b11300)."""
    _table(load)
    rows = data.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and isinstance(row.get("name"), str):
            size = {
                name: value * MIB if isinstance(value := row.get(name), int) and abs(value) < 1 << 40 else None
                for name in ("total", "free", "self", "model", "context", "compute")
            }
            _take(load, row["name"][:80], str(row.get("description", "")), size)
    return True


def _table(load: Building) -> None:
    """A table begins: what is held, once the engine has reserved everything; a projection before."""
    ended = load.complete or load.current.reserved
    if ended:
        load.held = load.reading = []
    else:
        load.fit_rows = load.reading = []


def _take(load: Building, device: str, what: str, size: dict[str, int | None]) -> None:
    if len(load.reading) >= MANY:
        return
    remote = device.startswith("RPC") and _ADDRESS.fullmatch(what)
    name = load.device(device, address=what) if remote else load.device(device)
    reserved = sum(context.parts.get((name, "compute"), 0) for context in load.contexts())
    load.reading.append(
        FitRow(
            device=name,
            total_bytes=size["total"],
            free_bytes=size["free"],
            self_bytes=size["self"] or 0,
            model_bytes=size["model"] or 0,
            context_bytes=size["context"] or 0,
            compute_bytes=size["compute"] or 0,
            reserved_bytes=reserved if reserved and reserved // MIB * MIB == size["compute"] else None,
        )
    )
