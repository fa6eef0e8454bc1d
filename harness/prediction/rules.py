"""What an engine decides before it loads a model: memory that it keeps free, the batch that it takes, what it evicts.

Sources: llama.cpp ``common/fit.cpp`` (b10434); Ollama ``server/sched.go`` and ``llm/llama_server.go`` (0.30 and later, which
start that same program with a batch of Ollama's choice), ``ml/device.go`` and ``llm/memory.go`` (before).
"""

from __future__ import annotations

from typing import Final

import msgspec

from harness.model.calibration import Calibration
from harness.prediction.memory import predict
from harness.text import release
from harness.units import CELL_PADDING, GIB, MIB, TOKENS_PER_UNIT, from_gib

#: What llama.cpp's fit keeps free on a device (common/common.h, ``fit_params_target``).
FIT_TARGET: Final = 1024 * MIB
#: What Ollama's Go runner sets aside for the driver's own memory (CUDA), in place of measuring it.
GO_MINIMUM: Final = 457 * MIB
#: Ollama >= 0.30, ``num_batch`` not set: context of all slots up to which a batch holds (``generationBatchForContext``).
OLLAMA_BATCHES: Final = ((4096, 512), (32768, 1024), (None, 2048))
#: Percent of the free memory up to which Ollama's estimate lets a batch be, and what the batch adds to the estimate.
_HEADROOM: Final = {2048: 60, 1024: 75}
_SURCHARGE: Final = {2048: 2 * GIB, 1024: 768 * MIB}
#: Percent of the free memory above which Ollama takes a model for one that does not fit.
_FULL: Final = 80
#: Models that Ollama keeps loaded on a device at most (``OLLAMA_MAX_LOADED_MODELS`` not set).
MAX_LOADED: Final = 3
#: The release from which Ollama starts llama.cpp's server, and its own Go runner no more.
_SERVER_SINCE: Final = (0, 30, 0)


def constants() -> dict[str, object]:
    """The figures of these rules as data, for the page of ``harness report``; bytes, tokens, percent, a release."""
    return {
        "fit_target": FIT_TARGET,
        "go_minimum": GO_MINIMUM,
        "batches": OLLAMA_BATCHES,
        "headroom": _HEADROOM,
        "surcharge": _SURCHARGE,
        "full": _FULL,
        "max_loaded": MAX_LOADED,
        "server_since": _SERVER_SINCE,
        "tokens_per_unit": TOKENS_PER_UNIT,
        "cell_padding": CELL_PADDING,
    }


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A model stays on its device if ``required + reserve_bytes <= available``.

    ``estimates`` says that the engine decides by an estimate of its own, which may differ from what it then takes;
    ``go_runner`` that Ollama's Go runner places the layers, not llama.cpp's fit.
    """

    reserve_bytes: int
    go_runner: bool = False
    estimates: bool = False


def rule_of(calibration: Calibration) -> Rule:
    """The placement rule of the engine and version that a calibration was made with.

    llama.cpp reads free memory when its driver context is there already, so overhead counts as required. Ollama's Go runner
    (0.12.11 to 0.24) reads it before and sets a fixed amount aside for it; earlier ones decide by closed formulas.
    """
    metadata = calibration.metadata
    if metadata.machine.target == "host":
        return Rule(reserve_bytes=0)
    recorded = metadata.placement.reserve_gb
    reserve = FIT_TARGET if recorded is None else from_gib(recorded)
    version = release(metadata.engine.version)
    if calibration.engine != "ollama" or version is None or version >= _SERVER_SINCE:
        return Rule(reserve_bytes=reserve)
    overhead = from_gib(metadata.breakdown_gb.overhead or 0.0)
    return Rule(reserve_bytes=max(GO_MINIMUM - overhead, 0), go_runner=True, estimates=version < (0, 12, 11))


def batch_of(calibration: Calibration, context: int, num_parallel: int, available: int | None) -> int | None:
    """The physical batch that the engine will take, of those measured; ``None`` where it takes one at every context.

    Ollama >= 0.30 goes by the context of all slots, then takes less while its own estimate is above a share of the free memory.
    On CUDA without flash attention it takes 512 (``automaticGenerationBatch``).
    """
    measured = sorted({band.num_batch for band in calibration.metadata.bands if band.num_batch is not None})
    if calibration.engine != "ollama" or len(measured) < 2:
        return None
    cells = context * num_parallel
    wanted = next(batch for limit, batch in OLLAMA_BATCHES if limit is None or cells <= limit)
    metadata = calibration.metadata
    if metadata.settings.flash_attention == "disabled" and metadata.machine.meter == "nvml":
        wanted = 512
    if available is not None:
        estimate = ollama_estimate(calibration, context, num_parallel)
        while wanted > measured[0] and wanted in _HEADROOM and not _batch_fits(wanted, estimate, available):
            wanted //= 2
    return max((batch for batch in measured if batch <= wanted), default=measured[0])


def _batch_fits(batch: int, estimate: int, available: int) -> bool:
    limit = available * _FULL // 100
    return estimate <= min(limit, available * _HEADROOM[batch] // 100) and _SURCHARGE[batch] <= limit - estimate


def ollama_estimate(calibration: Calibration, context: int, num_parallel: int = 1) -> int:
    """What Ollama >= 0.30 reckons a model to take (``PredictServerVRAM``), bytes; our own figure without its shape."""
    placement = calibration.metadata.placement
    if placement.estimate_base_gb is None or placement.estimate_gb_per_10k is None:
        return predict(calibration, context, num_parallel).total_bytes
    cells = context * num_parallel
    return from_gib(placement.estimate_base_gb + placement.estimate_gb_per_10k * cells / TOKENS_PER_UNIT)


def evicts_others(calibration: Calibration, context: int, num_parallel: int, available: int, loaded: int) -> bool:
    """Whether Ollama >= 0.30 ends one of ``loaded`` models before it starts this one (server/sched.go, ``load``)."""
    if calibration.engine != "ollama":
        return False
    if loaded >= MAX_LOADED * max(len(calibration.metadata.machine.gpus), 1):
        return True
    batch = batch_of(calibration, context, num_parallel, available) or 0
    surcharge = next((size for least, size in _SURCHARGE.items() if batch >= least), 0)
    return ollama_estimate(calibration, context, num_parallel) + surcharge > available * _FULL // 100
