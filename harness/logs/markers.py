"""Where Ollama starts an engine, and with which arguments.

Markers: ``starting llama runner`` (0.1.0 - 0.1.17, llm/llama.go), ``starting llama server`` (0.1.32 - 0.11.4, llm/server.go),
``starting runner`` (0.11.5 - 0.24), ``starting llama-server`` (0.30 and later, llm/llama_server.go). Go prints the command in
one string without quoting its words, and the string with Go's escapes (Windows paths have doubled backslashes).
"""

from __future__ import annotations

import re
from typing import Final

from harness.logs.slog import pairs

#: A runner without these words loads nothing: it looks for GPUs.
_MODEL: Final = re.compile(r"(?<!\S)--model(?: |=)(?P<value>\"[^\"]+\"|.+?)(?=\s{1,4}--?[A-Za-z]|\s{0,4}$)")
_ARGUMENTS: Final = {
    "parallel": re.compile(r"(?<!\S)(?:-np|--parallel) (\d{1,6})"),
    "cells": re.compile(r"(?<!\S)(?:-c|--ctx-size) (\d{1,12})"),
    "batch": re.compile(r"(?<!\S)(?:-ub|--ubatch-size) (\d{1,9})"),
    "type_k": re.compile(r"(?<!\S)(?:-ctk|--cache-type-k|--kv-cache-type) (\w{1,16})"),
    "type_v": re.compile(r"(?<!\S)(?:-ctv|--cache-type-v|--kv-cache-type) (\w{1,16})"),
}
#: The physical batch of a runner without ``-ub``.
_BATCH: Final = re.compile(r"(?<!\S)(?:-b|--batch-size) (\d{1,9})")
_FLASH: Final = re.compile(r"(?<!\S)(?:-fa|--flash-attn)(?: (on|off|auto)(?!\S))?")


def command(line: str) -> str:
    """The command of a start marker; empty where the marker has none (0.1.0 - 0.1.17)."""
    return pairs(line).get("cmd", "")


def model_of(text: str) -> str | None:
    """The path behind ``--model``, with its spaces."""
    found = _MODEL.search(text)
    return found["value"].strip('"') if found else None


def arguments(text: str) -> dict[str, str]:
    """What a command asks for, by our own names; only what it says."""
    found = {name: match[1] for name, pattern in _ARGUMENTS.items() if (match := pattern.search(text))}
    if "batch" not in found and (batch := _BATCH.search(text)):
        found["batch"] = batch[1]
    if flash := _FLASH.search(text):
        found["flash"] = flash[1] or "on"
    return found
