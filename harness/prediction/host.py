"""What a model takes of host memory while its target is a GPU, and whether the host can hold it.

On the host are the input embeddings and pinned buffers (logged with everything on the GPU), layers and experts that are not on
the GPU, and their caches. llama.cpp's server keeps finished prompts there, too (``--cache-ram``, 8,192 MiB where it is not set;
tools/server/README.md), and checkpoints of windows and recurrent state (``--ctx-checkpoints``, 32 a slot).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from harness.model.calibration import Calibration
from harness.prediction.memory import Prediction
from harness.prediction.placement import Placed
from harness.units import MIB, format_size, from_gib

if TYPE_CHECKING:
    from harness.prediction.verdict import Verdict

#: llama.cpp's server (common/common.h): ``cache_ram_mib``, and the checkpoints of a slot.
CACHE_RAM: Final = 8192 * MIB
CHECKPOINTS: Final = 32


def host_bytes(calibration: Calibration, needed: Prediction, placed: Placed | None) -> int | None:
    """Bytes of host memory that it takes for certain; ``None`` where it was not logged and nothing is known to be there.

    ``placed`` is what is not on the GPU; ``None``: all of it is. Layers on the host compute there, with buffers that are not
    above those of the GPU.
    """
    metadata = calibration.metadata
    if metadata.machine.target == "host":
        return needed.total_bytes
    logged = metadata.placement.host_gb
    moved = 0 if placed is None else placed.host_bytes
    if logged is None and not moved:
        return None
    cache = metadata.settings.env.get("LLAMA_ARG_CACHE_RAM", "")
    asked = int(cache) * MIB if cache.isdecimal() else 0
    return from_gib(logged or 0.0) + moved + (needed.compute_bytes or 0 if moved else 0) + asked


def may_grow(calibration: Calibration, needed: Prediction) -> int:
    """Bytes that the prompt cache and checkpoints may come to take beside that, at most, where they are not set."""
    env = calibration.metadata.settings.env
    checkpoints = env.get("LLAMA_ARG_CTX_CHECKPOINTS", "")
    count = int(checkpoints) if checkpoints.isdecimal() else CHECKPOINTS
    cache = 0 if "LLAMA_ARG_CACHE_RAM" in env else CACHE_RAM
    return cache + count * (needed.fixed_cache_bytes or 0)


def with_host(verdict: Verdict, available: int | None, growth: int = 0) -> Verdict:
    """The verdict with the side of the host judged: what it cannot hold does not fit, whatever the GPU holds.

    ``available`` is host memory, ``None`` where it is not known; ``growth`` what may be added later (:func:`may_grow`).
    """
    required = verdict.host_required_bytes
    if verdict.basis == "host":
        held, short_bytes = verdict.available_bytes, verdict.short_bytes
        return msgspec.structs.replace(verdict, host_available_bytes=held, host_short_bytes=short_bytes)
    if verdict.verdict == "unknown" or required is None or available is None:
        return msgspec.structs.replace(verdict, host_available_bytes=available)
    short = required - available
    warnings = verdict.warnings
    if 0 <= -short < growth:
        warnings += (
            f"the engine's prompt cache and checkpoints may grow by up to {format_size(growth, 1)} of host memory, and "
            f"{format_size(-short, 1)} would be left: limit them with LLAMA_ARG_CACHE_RAM (MiB) and LLAMA_ARG_CTX_CHECKPOINTS",
        )
    return msgspec.structs.replace(
        verdict,
        verdict="offload" if short > 0 else verdict.verdict,
        host_available_bytes=available,
        host_short_bytes=max(short, 0),
        warnings=warnings,
    )
