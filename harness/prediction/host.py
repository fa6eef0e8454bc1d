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
from harness.units import MIB, from_gib

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from harness.prediction.rules import Growth, Rules
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


def server_caches(calibration: Calibration, needed: Prediction, env: Mapping[str, str]) -> int:
    """Bytes that the prompt cache and checkpoints of llama.cpp's server may come to take, at most.

    The prompt cache removes its oldest prompts to stay below its size; without a limit (-1) it keeps prompts of one whole
    context (``server_prompt_cache``, tools/server/server-task.cpp of b11434). What a calibration set is counted already.
    """
    own = calibration.metadata.settings.env
    cache = 0
    if (size := env.get("LLAMA_ARG_CACHE_RAM", "")) != own.get("LLAMA_ARG_CACHE_RAM", ""):
        unlimited = (needed.context_cache_bytes or 0) + (needed.fixed_cache_bytes or 0)
        cache = int(size) * MIB if size.isdecimal() else unlimited if size.startswith("-") else CACHE_RAM
    elif not size:
        cache = CACHE_RAM
    checkpoints = env.get("LLAMA_ARG_CTX_CHECKPOINTS", "")
    count = int(checkpoints) if checkpoints.isdecimal() else CHECKPOINTS
    return cache + count * (needed.fixed_cache_bytes or 0)


def growth_of(
    calibration: Calibration, verdict: Verdict, needed: Prediction, rules: Rules, env: Mapping[str, str] | None
) -> Growth | None:
    """What a server with ``env`` may come to take of host memory beside what a verdict counts; ``None``: nothing is known."""
    if verdict.required_bytes is None or (verdict.basis == "gpu" and verdict.host_required_bytes is None):
        return None
    return rules.may_grow(calibration, needed, {**calibration.metadata.settings.env, **(env or {})})


def with_growth(
    verdict: Verdict, calibration: Calibration, needed: Prediction, rules: Rules, env: Mapping[str, str] | None
) -> Verdict:
    """The verdict with what the engine may come to take of host memory; for a model that is all there, it is judged."""
    growth = growth_of(calibration, verdict, needed, rules, env)
    return with_host(msgspec.structs.replace(verdict, host_growth_bytes=0 if growth is None else growth.most), None)


class HostMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Host memory beside what is free of a GPU, and what servers on it are set to.

    ``available`` is bytes, ``None`` where it is not known; ``environments`` the variables that each engine has here, over those
    of a calibration. ``growth`` is what models that were started before may come to take of it, bytes.
    """

    available: int | None = None
    environments: Mapping[str, Mapping[str, str]] = {}
    growth: int = 0

    def beside(self, verdicts: Iterable[Verdict]) -> HostMemory:
        """What models that stay leave of it."""
        some = [one for one in verdicts if one.verdict != "unknown"]
        taken = sum(one.host_required_bytes or 0 for one in some)
        growth = sum(one.host_growth_bytes or 0 for one in some)
        left = None if self.available is None else max(self.available - taken, 0)
        return msgspec.structs.replace(self, available=left, growth=self.growth + growth)


def with_host(verdict: Verdict, available: int | None, before: int = 0) -> Verdict:
    """The verdict with the side of the host judged: what it cannot hold does not fit, whatever the GPU holds.

    ``available`` is host memory, ``None`` where it is not known. Where the host could not hold what the engine may come to take
    there later (``host_growth_bytes``, and ``before`` of models that were started earlier), what fits is ``tight``.
    """
    required, growth = verdict.host_required_bytes, verdict.host_growth_bytes or 0
    if verdict.basis == "host":
        left = (verdict.margin_bytes or 0) - (verdict.uncertainty_bytes or 0)
        judged = msgspec.structs.replace(
            verdict, host_available_bytes=verdict.available_bytes, host_short_bytes=verdict.short_bytes
        )
    elif verdict.verdict == "unknown" or required is None or available is None:
        return msgspec.structs.replace(verdict, host_available_bytes=available)
    else:
        left = available - required
        judged = msgspec.structs.replace(
            verdict,
            verdict="offload" if left < 0 else verdict.verdict,
            host_available_bytes=available,
            host_short_bytes=max(-left, 0),
        )
    return msgspec.structs.replace(judged, tight=judged.tight or (judged.verdict == "fits" and left < growth + before))
