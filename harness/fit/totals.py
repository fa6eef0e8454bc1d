"""A run whose log was not understood: the meter's totals alone, and no parts.

The meter is primary and the log explains. A new version of an engine may word its log differently; what was measured stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Final

import msgspec

from harness.errors import UntrustedError
from harness.fit.artifact import calibration_of
from harness.fit.constants import MAX_ERROR
from harness.fit.lines import Line, fit_line
from harness.fit.observations import BY_LOG, allowed_spread, logged_bytes, measured_total, refuse_disturbed, understood
from harness.model.calibration import (
    PARTS_UNKNOWN,
    Band,
    Breakdown,
    Calibration,
    MeasuredLoad,
)
from harness.model.record import Load, Record
from harness.units import TOKENS_PER_UNIT, gib

_WHY: Final = (
    f"{PARTS_UNKNOWN}; base and slope are of the meter's totals, so they hold for this number of slots alone, and that every "
    "layer lay on the target is not confirmed by the log"
)


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """One load as the meter saw it: tokens per slot, physical batch as asked, bytes."""

    context: int
    num_batch: int | None
    total: float


def totals_of(record: Record) -> tuple[Total, ...]:
    """The loads that the meter measured, where the log explains none of them; else none, nor where the log is the meter."""
    measured = [load for load in record.loads if _is_measured(load, record)]
    if not measured or record.machine.meter in BY_LOG:
        return ()
    read = [load for load in measured if understood(load.facts)]
    if read and not _unexplained(read, record):
        return ()
    return tuple(
        Total(context=load.request.context, num_batch=load.request.num_batch, total=measured_total(load, record) or 0.0)
        for load in measured
    )


def _is_measured(load: Load, record: Record) -> bool:
    request = load.request
    return (
        request.purpose == "point"
        and load.outcome == "ok"
        and load.ready is not None
        and measured_total(load, record) is not None
        and not (load.facts is not None and (load.facts.failed or load.facts.in_blocks))
        and (measured_total(load, record) or 0.0) >= _weights(record)
    )


def _weights(record: Record) -> float:
    """Weights of the repeating layers: a total below this is of a load that is elsewhere."""
    return float(sum(record.tensors.layer_bytes)) if record.tensors is not None else 0.0


def _unexplained(loads: Sequence[Load], record: Record) -> bool:
    """Whether the log names no cache, and what it does not name grows: a cache whose line was not understood."""
    named = any(
        load.facts is not None and (load.facts.total("kv_cache_bytes") or load.facts.total("recurrent_bytes")) for load in loads
    )
    if named or len(loads) < 2:
        return False
    beyond = [(measured_total(load, record) or 0.0) - logged_bytes(load, record) for load in loads]
    return max(beyond) - min(beyond) > allowed_spread(max(measured_total(load, record) or 0.0 for load in loads))


def fit_totals(record: Record, totals: Sequence[Total]) -> Calibration:
    """The calibration of a record whose log was not understood.

    Raises:
        UntrustedError: fewer than two contexts of one batch, a leave-one-out error above 1 %, or a load that was disturbed.
    """
    for load in record.loads:
        if load.request.purpose == "point" and load.outcome == "ok":
            refuse_disturbed(load)
    batches: dict[int | None, list[Total]] = {}
    for total in totals:
        batches.setdefault(total.num_batch, []).append(total)
    lines = {
        batch: fit_line([(float(one.context), one.total) for one in group])
        for batch, group in batches.items()
        if len({one.context for one in group}) > 1
    }
    if not lines:
        raise UntrustedError(
            f"{PARTS_UNKNOWN}, and one load is not enough: a line needs two contexts of one physical batch",
            hint="calibrate with at least two contexts (--ctx), or with one batch (--num-batch)",
            code="too-few-points",
        )
    slots = record.settings.num_parallel
    order = sorted(lines, key=lambda batch: batch or 0)
    bands = tuple(_band(batch, lines[batch], batches[batch], slots) for batch in order)
    error = max((_left_out(batches[batch]) for batch in order if len(batches[batch]) > 2), default=None)
    if error is not None and error > MAX_ERROR:
        raise UntrustedError(
            f"{PARTS_UNKNOWN}, and a load left out is predicted with an error of {error:.2%}, above {MAX_ERROR:.0%}: memory is "
            "not a straight line over these contexts",
            hint="calibrate with --ctx beyond the sliding window plus the batch",
            code="not-a-line",
        )
    notes = [_WHY]
    if error is None:
        notes.append("max_error was not measured: it needs three contexts in one band")
    return calibration_of(
        record,
        bands,
        Breakdown(weights=None, fixed_cache=None, compute=None, overhead=None),
        settings=msgspec.structs.replace(record.settings, num_batch=bands[-1].num_batch or record.settings.num_batch),
        loads=(
            MeasuredLoad(context=one.context, num_batch=one.num_batch, total_gb=gib(one.total))
            for one in totals
            if one.num_batch in lines
        ),
        max_error=error,
        spread=None,
        notes=notes,
    )


def _band(batch: int | None, line: Line, group: Sequence[Total], slots: int) -> Band:
    return Band(
        up_to=max(one.context for one in group),
        num_batch=batch,
        base_vram_gb=gib(max(line.start, 0.0)),
        kv_cache_gb_per_10k=gib(max(line.slope, 0.0) * TOKENS_PER_UNIT / slots),
        compute_gb_per_10k=0.0,
        fixed_cache_gb=None,
    )


def _left_out(group: Sequence[Total]) -> float:
    """The worst relative error when each load in turn is predicted from the others."""
    errors = []
    for others in combinations(group, len(group) - 1):
        (left,) = [one for one in group if one not in others]
        if len({one.context for one in others}) > 1:
            line = fit_line([(float(one.context), one.total) for one in others])
            errors.append(abs(line.at(left.context) - left.total) / left.total)
    return max(errors, default=0.0)
