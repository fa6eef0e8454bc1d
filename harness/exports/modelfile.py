"""Ollama's Modelfile (``parser/parser.go`` of 0.33: a line a command, a value to the end of its line)."""

from __future__ import annotations

from collections.abc import Sequence

from harness.exports.entry import Entry, comments


def write(entries: Sequence[Entry], _style: str, _together: Sequence[Sequence[int]]) -> str:
    """The model with its parameters; slots and KV cache are settings of the server."""
    (entry,) = entries
    server = f"slots and the KV cache ({entry.calibration.metadata.settings.kv_cache_type}) are the server's: export ollama-env"
    lines = [f"FROM {quoted(entry.model)}"]
    lines += [f"PARAMETER {name} {value}" for name, value in entry.start.parameters.items()]
    return comments(entries, server) + "\n".join(lines) + "\n"


def quoted(value: str) -> str:
    """A value as the parser reads it back: quotes stand around one that begins with a quote or has spaces at its ends."""
    if value.startswith('"') or value != value.strip():
        return f'"""{value}"""' if '"' in value else f'"{value}"'
    return value
