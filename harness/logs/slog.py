"""Ollama's own lines: Go's ``log/slog`` text format, ``key=value`` with quoted values (log/slog, text_handler.go)."""

from __future__ import annotations

import re
from typing import Final

from harness.units import GIB, KIB, MIB

_PAIR: Final = re.compile(r'(?:^|\s)(?P<key>"(?:[^"\\]|\\.)*"|[^\s="]+)=(?P<value>"(?:[^"\\]|\\.)*"|\S*)')
_HUMAN: Final = re.compile(r"^(?P<number>\d{1,12}(?:\.\d{1,6})?) (?P<unit>B|KiB|MiB|GiB|TiB)$")
_UNITS: Final = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": GIB << 10}


def pairs(line: str) -> dict[str, str]:
    """The pairs of a slog line; a repeated key keeps its first value."""
    found: dict[str, str] = {}
    for match in _PAIR.finditer(line):
        key, value = match["key"].strip('"'), match["value"]
        if value.startswith('"') and value.endswith('"') and len(value) > 1:
            value = value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
        found.setdefault(key, value)
    return found


def human_bytes(text: str) -> tuple[int, int] | None:
    """``HumanBytes2`` (format/bytes.go): bytes, and how far they may be off (half of the last decimal)."""
    match = _HUMAN.match(text)
    if match is None:
        return None
    unit = _UNITS[match["unit"]]
    return round(float(match["number"]) * unit), (0 if unit == 1 else round(0.05 * unit))
