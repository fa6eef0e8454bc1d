"""A calibration that was not measured: fitted through loads that an engine has planned, or that arithmetic describes.

It is a value for the same rules that judge measured ones, and is never written: ``method`` and ``doubt`` go with it. Where the
driver's part is not known it is taken at the upper end of what was seen, so that an estimate errs towards *does not fit*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from harness.errors import UntrustedError
from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.facts import DeviceFacts, EngineName, LoadFacts
from harness.model.planned import Method, PlannedLoad, Shape
from harness.model.record import EngineVersion, Estimate, Load, LoadRequest, Machine, Model, Record, Settings, Tensors
from harness.prediction.formula import CACHE_DOUBT, COMPUTE_DOUBT, UNKNOWN_DOUBT, WEIGHTS_DOUBT
from harness.prediction.memory import predict
from harness.units import MIB, gib

#: How far a dry run may be off, relative to all but the driver's part (docs/explanation/estimates.md).
DRY_RUN_DOUBT: Final = 0.02
#: Engines draw models with a device as if it were one; names of ours for the two kinds of memory.
DEVICE: Final = {"gpu": "GPU0", "host": "CPU"}


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine takes beyond its log: bytes, how far that may be off, and where the figure is from."""

    size: int
    doubt: int
    origin: str


#: Where no calibration of the device says it: of CUDA on an H100 589 MiB idle and 727 after a prompt, of llama-server's heap
#: on the host 40 to 110 MiB (docs/explanation/gpu.md, docs/explanation/estimates.md).
DEFAULT_OVERHEAD: Final = {
    "gpu": Overhead(size=650 * MIB, doubt=150 * MIB, origin="a default, not measured here"),
    "host": Overhead(size=110 * MIB, doubt=80 * MIB, origin="a default, not measured here"),
}


class EstimatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model whose memory is estimated."""

    model: Model
    shape: Shape
    tensors: Tensors
    estimate: Estimate | None = None


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One planned load."""

    request: LoadRequest
    load: PlannedLoad


def planned_load(one: Planned, subject: EstimatedModel, engine: EngineName, target: str, slots: int) -> Load:
    """The load as a record has it: what is planned for the host, on the target."""
    shape, planned, device = subject.shape, one.load, DEVICE[target]
    caches = tuple(msgspec.structs.replace(cache, devices={device: cache.total_bytes}) for cache in planned.caches)
    on_gpu = target == "gpu"
    own = DeviceFacts(
        kind="gpu" if on_gpu else "host",
        weights_bytes=shape.weights_bytes - (shape.input_bytes if on_gpu else 0),
        kv_cache_bytes=sum(cache.total_bytes for cache in caches),
        recurrent_bytes=planned.recurrent_bytes or None,
        # On a GPU the inputs of a batch stay on the host; what is planned for the host alone has them too: a little more.
        compute_bytes=planned.compute_bytes,
        output_bytes=None if on_gpu else planned.output_bytes,
    )
    layers = shape.layers + 1 if on_gpu else None
    facts = LoadFacts(
        engine=engine, dialect="llama.cpp", complete=True, devices={device: own}, caches=caches, parallel=slots,
        context_cells=max((cache.cells or 0) * cache.streams for cache in caches) if caches else one.request.context * slots,
        num_batch=one.request.num_batch, flash_attention=planned.flash_attention, kv_cache_type=planned.kv_cache_type,
        layers_offloaded=layers, layers_total=layers,
    )  # fmt: skip
    return Load(request=one.request, outcome="ok", facts=facts, ready=0.0)


def estimated(record: Record, shape: Shape, overhead: Overhead, method: Method, context: int) -> Calibration:
    """The calibration of planned loads, with the driver's part; its ``max_error`` is the doubt at ``context`` tokens.

    Raises:
        UntrustedError: they lie on no line.
    """
    fitted = fit_record(record)
    more = gib(overhead.size)
    metadata = fitted.metadata
    bands = tuple(msgspec.structs.replace(band, base_vram_gb=round(band.base_vram_gb + more, 6)) for band in metadata.bands)
    constants = msgspec.structs.replace(fitted.constants, base_vram_gb=bands[-1].base_vram_gb)
    breakdown = msgspec.structs.replace(metadata.breakdown_gb, overhead=more)
    metadata = msgspec.structs.replace(metadata, bands=bands, breakdown_gb=breakdown, run=None, weights="header")
    calibration = msgspec.structs.replace(fitted, constants=constants, metadata=metadata)
    error = _doubt(calibration, shape, overhead, method, context) + (fitted.metadata.quality.max_error or 0.0)
    # The doubt is that of the whole at one context; loads without a total let the interval go with what is predicted alone.
    loads = tuple(msgspec.structs.replace(load, total_gb=0.0) for load in metadata.quality.loads)
    quality = msgspec.structs.replace(metadata.quality, loads=loads, max_error=round(error, 6), notes=())
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(metadata, quality=quality))


def _doubt(calibration: Calibration, shape: Shape, overhead: Overhead, method: Method, context: int) -> float:
    """How far the whole may be off at a context, relative."""
    slots = calibration.metadata.settings.num_parallel
    at = predict(calibration, min(context, calibration.metadata.quality.valid_to), slots)
    cache, compute = (at.fixed_cache_bytes or 0) + (at.context_cache_bytes or 0), at.compute_bytes or 0
    known = (at.weights_bytes or 0) + cache + compute
    doubt = DRY_RUN_DOUBT * known
    if method == "formula":
        doubt = WEIGHTS_DOUBT * (at.weights_bytes or 0) + COMPUTE_DOUBT * compute
        doubt += (CACHE_DOUBT if shape.known else UNKNOWN_DOUBT) * cache
    return (doubt + overhead.doubt) / max(at.total_bytes, 1)


def record_of(
    subject: EstimatedModel, loads: Sequence[Load], *, name: str, engine: EngineName, version: str | None, settings: Settings,
    target: str, reserve: int | None, batch_limits: tuple[tuple[int, int], ...],
) -> Record:  # fmt: skip
    """A record of loads that were planned; it has no run."""
    return Record(
        run="", harness_version="", started_at="", id=f"{engine}/{name}", engine_name=engine, model=subject.model,
        engine=EngineVersion(version=version), settings=settings, reserve_bytes=reserve, tensors=subject.tensors,
        machine=Machine(target="gpu" if target == "gpu" else "host", sandbox="process", meter="log"),
        estimate=subject.estimate, batch_limits=batch_limits, loads=tuple(loads), weights="header",
    )  # fmt: skip


__all__ = ["UntrustedError", "estimated", "planned_load", "record_of"]
