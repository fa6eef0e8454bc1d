"""Ollama's own lines: Go's ``log/slog`` text format, ``key=value`` with quoted values (log/slog, text_handler.go)."""

from __future__ import annotations

import re
from typing import Final

from harness.units import GIB, KIB, MIB

#: A quote that never closes takes the rest of the line, so that no line is read twice over.
_QUOTED: Final = r'"(?:[^"\\]|\\.)*+(?:"|$)'
_PAIR: Final = re.compile(rf'(?:^|\s)(?P<key>{_QUOTED}|[^\s="]++)(?:=(?P<value>{_QUOTED}|\S*+))?')
_ESCAPE: Final = re.compile(r"\\(.)")
_HUMAN: Final = re.compile(r"^(?P<number>\d{1,12}(?:\.\d{1,6})?) (?P<unit>B|KiB|MiB|GiB|TiB)$")
_UNITS: Final = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": GIB << 10}


def pairs(line: str) -> dict[str, str]:
    """The pairs of a slog line, unquoted; a repeated key keeps its first value."""
    found: dict[str, str] = {}
    for match in _PAIR.finditer(line):
        value = match["value"]
        if value is None:
            continue
        if value.startswith('"'):
            value = _ESCAPE.sub(_unescape, value[1 : -1 if value.endswith('"') and len(value) > 1 else None])
        found.setdefault(match["key"].strip('"'), value)
    return found


def _unescape(match: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t", "r": "\r"}.get(match[1], match[1])


def human_bytes(text: str) -> tuple[int, int] | None:
    """``HumanBytes2`` (format/bytes.go): bytes, and how far they may be off (half of the last decimal)."""
    match = _HUMAN.match(text)
    if match is None:
        return None
    unit = _UNITS[match["unit"]]
    return round(float(match["number"]) * unit), (0 if unit == 1 else round(0.05 * unit))
