"""llama.cpp's projection before a load (``common_params_fit_impl``, common/fit.cpp; ``llama_params_fit_impl`` before 2026-04).

Integer MiB, truncated. A projection is no allocation: its rows never become devices of a load.
"""

from __future__ import annotations

import re
from typing import Final

from harness.logs.building import MANY, Building
from harness.model.facts import FitRow
from harness.units import MIB

_ROW: Final = re.compile(
    r"\|\s{1,8}- (?P<device>\S{1,80})[^|]{0,200}\|\s*(?:(?P<total>-?\d{1,12}) =\s*(?P<free>-?\d{1,12}) \+ \(\s*)?"
    r"(?P<self>\d{1,12}) =\s*(?P<model>\d{1,12}) \+\s*(?P<context>\d{1,12}) \+\s*(?P<compute>\d{1,12})"
)
_PROJECTED: Final = re.compile(r"projected to use (\d{1,12}) MiB of (?:device|host) memory vs\. (\d{1,12}) MiB")
_TARGET: Final = re.compile(r"(?:will leave -?\d{1,12} >= |free memory target of )(\d{1,12}) MiB")
_LAYERS: Final = re.compile(r"- (?P<device>\S{1,80}) .{0,200}?:\s*\d{1,6} layers(?: \(\s*(?P<over>\d{1,6}) overflowing\))?,")


def is_fit(line: str) -> bool:
    """Whether a line belongs to a projection."""
    return "_fit" in line or "breakdown" in line


def read(load: Building, line: str) -> None:
    """Take one such line."""
    if load.complete:
        return  # the table is printed again at exit
    if "error while trying to fit" in line:
        load.failure = None  # the projection failed; the load itself is tried all the same
    elif "memory breakdown [MiB]" in line:
        load.fit_rows = []
    elif row := _ROW.search(line):
        if len(load.fit_rows) < MANY:
            load.fit_rows.append(_row(row))
    elif projected := _PROJECTED.search(line):
        load.projected, load.free = int(projected[1]) * MIB, int(projected[2]) * MIB
        load.overflow, load.nothing_overflows = {}, False
    elif (layers := _LAYERS.search(line)) and len(load.overflow) < MANY:
        load.overflow[layers["device"]] = int(layers["over"] or 0)
    if target := _TARGET.search(line):
        load.target = int(target[1]) * MIB
        load.nothing_overflows = "no changes needed" in line


def _row(row: re.Match[str]) -> FitRow:
    def size(name: str) -> int | None:
        return None if row[name] is None else int(row[name]) * MIB

    return FitRow(
        device=row["device"].split("[", 1)[0] or row["device"],
        total_bytes=size("total"),
        free_bytes=size("free"),
        self_bytes=size("self") or 0,
        model_bytes=size("model") or 0,
        context_bytes=size("context") or 0,
        compute_bytes=size("compute") or 0,
    )
