"""The one place where a calibration is made: of a record, and of the figures that were fitted to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.fit.speed import fit_performance, fit_placement
from harness.model.calibration import (
    SCHEMA_VERSION,
    Band,
    Breakdown,
    Calibration,
    Constants,
    KvBlocks,
    MeasuredLoad,
    Metadata,
    Quality,
)
from harness.model.record import EngineVersion, Machine, Model, Record, Settings
from harness.units import gib


def calibration_of(
    record: Record,
    bands: Sequence[Band],
    breakdown: Breakdown,
    *,
    settings: Settings,
    loads: Iterable[MeasuredLoad],
    max_error: float | None,
    spread: float | None,
    notes: Sequence[str],
    model: Model | None = None,
    engine: EngineVersion | None = None,
    machine: Machine | None = None,
    kv_blocks: KvBlocks | None = None,
) -> Calibration:
    """The calibration of a record: its constants are those of the last band, which says how far it reaches.

    ``spread`` is that of the overhead, bytes; ``notes`` come before those of the record and of its speeds. Model, engine and
    machine are the record's unless a log has said more of them.
    """
    performance, speed_notes = fit_performance(record)
    last = bands[-1]
    growth = {"compute_gb_per_10k": last.compute_gb_per_10k} if last.compute_gb_per_10k else {}  # absent where it is zero
    return Calibration(
        id=record.id,
        engine=record.engine_name,
        constants=Constants(
            base_vram_gb=last.base_vram_gb,
            kv_cache_gb_per_10k=last.kv_cache_gb_per_10k,
            **growth,
        ),
        metadata=Metadata(
            schema_version=SCHEMA_VERSION,
            calibrated_at=record.started_at,
            model=model or record.model,
            engine=engine or record.engine,
            settings=settings,
            machine=machine or record.machine,
            breakdown_gb=breakdown,
            bands=tuple(bands),
            quality=Quality(
                loads=tuple(loads),
                max_error=None if max_error is None else round(max_error, 6),
                overhead_spread_gb=None if spread is None else gib(spread),
                valid_to=last.up_to,
                notes=(*notes, *record.notes, *speed_notes),
                plan_error=record.plan_error,
            ),
            placement=fit_placement(record),
            performance=performance,
            run=record.run,
            kv_blocks=kv_blocks,
            weights=record.weights,
            source=record.source,
        ),
    )
