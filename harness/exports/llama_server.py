"""llama-server: its command line, or the presets of its router (``--models-preset``; ``common/preset.cpp`` of b11434).

A section's name holds no ``]``; a value ends at ``;`` or ``#`` and has no quotes. What cannot be written is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import UsageError
from harness.exports import command_line
from harness.exports.entry import Entry, comments, unique


def write(entries: Sequence[Entry], style: str, together: Sequence[Sequence[int]]) -> str:
    """One command for each model, or one file of presets for all."""
    if style == "command":
        return command_line.write(entries, style, together)
    parts = ["version = 1\n"]
    for name, entry in zip(unique([entry.model for entry in entries]), entries, strict=True):
        if set("[]") & set(name) or name.strip() != name or name == "*":
            raise UsageError(f"{name!r} cannot be the name of a section of presets", code="bad-name")
        options = {"model": entry.weights, **entry.start.preset, **entry.start.variables}
        for value in options.values():
            if set(";#") & set(value) or value.strip() != value:
                raise UsageError(f"{value!r} cannot be a value of a preset: it ends at ; and #", code="bad-name")
        lines = [f"[{name}]", *(f"{key} = {value}" for key, value in options.items())]
        parts.append(comments([entry]) + "\n".join(lines) + "\n")
    return "\n".join(parts)
