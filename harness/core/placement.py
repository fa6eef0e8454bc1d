"""Where an engine puts the layers of a model: what it keeps free, which batch it takes, and how many layers stay on the GPU.

Sources: llama.cpp ``common/fit.cpp`` (``common_params_fit_impl``, b9222 to b10488); Ollama ``server/sched.go`` and
``llm/llama_server.go`` (0.30 and later: the same llama-server, started with a batch of Ollama's own choice), Ollama
``ml/device.go`` (0.12.11 to 0.24, the Go runner).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from harness.core.calibration import Band, Calibration
from harness.core.predict import predict
from harness.units import GIB, MIB, from_gib

#: What llama.cpp's fit keeps free on a device (``fit_params_target``, common/common.h).
FIT_TARGET: Final = 1024 * MIB
#: What Ollama's Go runner keeps for the driver (``GpuInfo.MinimumMemory``, CUDA), in place of measuring it.
GO_MINIMUM: Final = 457 * MIB
#: Ollama >= 0.30: (context of all slots, batch) for ``num_batch`` unset (``generationBatchForContext``).
OLLAMA_BATCHES: Final = ((4096, 512), (32768, 1024), (None, 2048))
#: Share of free memory up to which Ollama's own estimate lets a batch be, and what the batch adds to that estimate.
_HEADROOM: Final = {2048: 60, 1024: 75}
_SURCHARGE: Final = {2048: 2 * GIB, 1024: 768 * MIB}
#: Percent of free memory that Ollama's estimate may take before a model counts as one that does not fit.
_FULL: Final = 80
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine decides: the model stays on its device if ``required + reserve_bytes <= available``.

    ``fit`` says that llama.cpp's fit places the layers; ``estimates`` that the engine decides by an estimate of its own, which
    may differ from what it then takes.
    """

    reserve_bytes: int
    fit: bool = True
    estimates: bool = False


def version_of(text: str | None) -> tuple[int, int, int] | None:
    """``0.33.0-rc1`` as ``(0, 33, 0)``; ``None`` for builds and unknown versions."""
    match = _VERSION.match(text or "")
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def rule_of(calibration: Calibration) -> Rule:
    """The placement rule of the engine and version that a calibration was made with."""
    metadata = calibration.metadata
    if metadata.machine.target == "host":
        return Rule(reserve_bytes=0, fit=False)
    recorded = metadata.placement.reserve_gb
    reserve = FIT_TARGET if recorded is None else from_gib(recorded)
    if calibration.engine == "llama-server":
        return Rule(reserve_bytes=reserve)
    version = version_of(metadata.engine.version)
    if version is None or version >= (0, 30, 0):
        return Rule(reserve_bytes=reserve)
    overhead = from_gib(metadata.breakdown_gb.overhead or 0.0)
    return Rule(reserve_bytes=max(GO_MINIMUM - overhead, 0), fit=False, estimates=version < (0, 12, 11))


def batch_of(calibration: Calibration, context: int, num_parallel: int, available: int | None) -> int | None:
    """The physical batch that the engine will take, ``None`` where it has only one.

    Ollama >= 0.30 chooses by the context of all slots, then takes less while its own estimate of the model
    (``PredictServerVRAM``) is above a share of the free memory.
    """
    bands = [band for band in calibration.metadata.bands if band.num_batch is not None]
    if calibration.engine != "ollama" or len(bands) < 2:
        return None
    measured = sorted(band.num_batch for band in bands if band.num_batch is not None)
    cells = context * num_parallel
    wanted = next(batch for limit, batch in OLLAMA_BATCHES if limit is None or cells <= limit)
    estimate = ollama_estimate(calibration, context, num_parallel)
    if available is not None and estimate is not None:
        while wanted > 512 and not _batch_fits(wanted, estimate, available):
            wanted //= 2
    return max((batch for batch in measured if batch <= wanted), default=measured[0])


def _batch_fits(batch: int, estimate: int, available: int) -> bool:
    limit = available * _FULL // 100
    return estimate <= min(limit, available * _HEADROOM[batch] // 100) and _SURCHARGE[batch] <= limit - estimate


def ollama_estimate(calibration: Calibration, context: int, num_parallel: int = 1) -> int | None:
    """What Ollama >= 0.30 thinks that a model takes (``PredictServerVRAM``), bytes."""
    return predict(calibration, context, num_parallel).total_bytes


def band_of(calibration: Calibration, context: int, num_parallel: int, available: int | None) -> Band:
    """The band whose batch the engine will take."""
    batch = batch_of(calibration, context, num_parallel, available)
    for band in calibration.metadata.bands:
        if band.num_batch == batch and batch is not None:
            return band
    return calibration.band_for(context)


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Layers on the GPU (the output layer is one of ``total``), and how much of the weights that could move has not moved.

    ``host_share`` is the share of weights on the host, ``host_work`` of the bytes that one token reads; both 0 to 1.
    """

    total: int
    offloaded: int
    overflowing: int
    host_share: float
    host_work: float


def place(calibration: Calibration, context: int, num_parallel: int, budget: int, num_batch: int | None) -> Placed | None:
    """Which layers stay when a model may take ``budget`` bytes (overhead included); ``None`` where layers are not known."""
    metadata = calibration.metadata
    layers, weights = metadata.model.layers, metadata.placement.layer_weights_gb
    if not layers or weights is None:
        return None
    needed = predict(calibration, context, num_parallel, num_batch=num_batch)
    output = max(needed.weights_bytes - from_gib(weights), 0)
    each = (from_gib(weights) + needed.fixed_cache_bytes + needed.context_cache_bytes) / layers
    rest = budget - (needed.overhead_bytes or 0) - needed.compute_bytes - output
    if rest < 0:
        return Placed(total=layers + 1, offloaded=0, overflowing=0, host_share=1.0, host_work=1.0)
    kept = min(int(rest // each), layers)
    share = (layers - kept) * from_gib(weights) / layers / needed.weights_bytes
    return Placed(total=layers + 1, offloaded=kept + 1, overflowing=0, host_share=share, host_work=share)
