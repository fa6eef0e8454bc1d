"""A model's claim of memory in GPUStack: ``GPUSTACK_MODEL_VRAM_CLAIM`` and ``_RAM_CLAIM``, bytes of one instance."""

from __future__ import annotations

from collections.abc import Sequence

from harness.exports.entry import Entry, comments, document, unique


def write(entries: Sequence[Entry], _style: str, _together: Sequence[Sequence[int]]) -> str:
    """A document for each model: name, backend parameters, and the claim as its environment."""
    parts = []
    for name, entry in zip(unique([entry.label for entry in entries]), entries, strict=True):
        claim = "GPUSTACK_MODEL_VRAM_CLAIM" if entry.on_gpu else "GPUSTACK_MODEL_RAM_CLAIM"
        model = {
            "name": name,
            "backend_parameters": list(entry.start.arguments),
            "env": {claim: str(entry.claim), **entry.start.variables},
        }
        parts.append(comments([entry]) + document(model))
    return "---\n".join(parts)
