"""Which loads of a record are points of the fit, and what each one measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from harness.errors import UntrustedError
from harness.fit.growth import with_bookkeeping, with_full_pools, with_growth, without_room
from harness.fit.knots import Knot
from harness.model.calibration import SHARED_CACHE
from harness.model.facts import DeviceKind, LoadFacts, device_kind
from harness.model.record import Load, Record, Target
from harness.model.trace import BASELINE_TOLERANCE, READING_ERROR, Plateau
from harness.text import counted
from harness.units import MIB, format_size

#: An engine's own figure may differ from its log by this much, or by this share, before a note says so.
REPORTED_BYTES: Final = MIB
REPORTED_SHARE: Final = 0.01
_ALL_PARTS: Final = (
    "weights_bytes", "lora_bytes", "projector_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes", "output_bytes",
)  # fmt: skip


#: Meters that are the log itself.
BY_LOG: Final = ("log", "import")
_SPREAD: Final = 8 * MIB
_SPREAD_SHARE: Final = 0.005


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load that lay completely on the target; bytes on the target only.

    ``context`` is tokens per slot (the cells that the log names, over the slots). Of one slot: ``kv_per_slot`` the caches that
    grow with the context, ``window`` those of a sliding window, ``recurrent`` the state of recurrent layers. ``window_cells``
    are the cells of the window cache of one slot. ``overhead`` is what the meter saw beyond the log (``None`` with the log as
    meter), ``idle_overhead`` that before the first prompt, ``filled`` the tokens in the cache when ``total`` was read, ``pool``
    the part of compute that only the meter saw, and ``uncertainty`` how far the log's figures may be off because they are
    rounded. ``growth`` is what the overhead grows by, bytes per token, where that is a straight line; ``overhead`` is then
    without it. ``cells`` are those of all caches of one slot; each takes ``cell_bytes`` on the host beside the log, which
    ``overhead`` is without, too.
    """

    context: int
    parallel: int
    num_batch: int | None
    weights: float
    kv_per_slot: float
    window: float = 0.0
    window_cells: int | None = None
    recurrent: float = 0.0
    compute: float
    total: float
    overhead: float | None
    idle_overhead: float | None = None
    filled: int | None = None
    pool: float = 0.0
    growth: float = 0.0
    cells: float = 0.0
    cell_bytes: int = 0
    kv_cache_type: str | None = None
    flash_attention: str | None = None
    basis: str | None = None
    uncertainty: int = 0
    planned: bool = False

    @property
    def below_window(self) -> bool:
        """Whether the window cache was not yet at its full size, so that it, too, grows with the context."""
        return self.window_cells is not None and self.window_cells >= self.context


def allowed_spread(total: float) -> float:
    """How far the overhead of a run's loads may differ: 8 MiB, or 0.5 % of the most that was measured (bytes)."""
    return max(_SPREAD, _SPREAD_SHARE * total)


def spill_reason(facts: LoadFacts, target: Target, *, ready: bool = False) -> str | None:
    """Why a load is an observation and not a point; ``None`` if it is a point.

    ``ready`` is whether harness saw the server answer: then no line of the log has to say it. ``offloaded N/N`` alone proves
    nothing: a run on the host prints it too, and experts may overflow behind it.
    """
    if not facts.complete and not ready:
        return "the log has no ready line"
    if facts.failed:
        return facts.failure or "the load failed"
    if facts.estimated:
        return "the log holds estimates only"
    if facts.doubts:
        return f"the log contradicts itself ({facts.doubts[0]})"
    if target == "host":
        if any(device.kind == "gpu" and _bytes(device.weights_bytes) for device in facts.devices.values()):
            return "weights lie on a GPU although the target is the host"
        if beside := [name for name, one in facts.devices.items() if one.kind == "gpu" and _bytes(one.compute_bytes)]:
            return f"compute buffers are on {', '.join(beside)}, beside a model on the host"
        return None
    if facts.layers_overflowing:
        return f"experts of {counted(facts.layers_overflowing, 'layer')} overflow to the host"
    if _layers_missing(facts):
        return f"only {facts.layers_offloaded} of {facts.layers_total} layers are on the GPU"
    if not any(device.kind == "gpu" and _bytes(device.weights_bytes) for device in facts.devices.values()):
        return "no weights on a GPU"
    for name, device in facts.devices.items():
        if device.kind == "host" and (_bytes(device.kv_cache_bytes) or _bytes(device.recurrent_bytes)):
            return f"KV cache or recurrent state is on {name}"
    return None


def _layers_missing(facts: LoadFacts) -> bool:
    """Whether repeating layers are on the host. llama.cpp places the output layer first, Ollama's Go engine last."""
    if facts.layers_offloaded is None or facts.layers_total is None:
        return False
    return facts.layers_total - facts.layers_offloaded > (1 if facts.dialect == "ollama-go" else 0)


def _bytes(value: int | None) -> int:
    return value or 0


def points_of(record: Record) -> tuple[list[Point], list[str]]:
    """The points of a record in plan order, and notes about the loads that are none.

    Raises:
        UntrustedError: loads of different cache types, flash attention or slots in one record.
    """
    points: list[Point] = []
    notes: list[str] = []
    for load in sorted(record.loads, key=lambda one: one.request.purpose == "planned"):
        if load.request.purpose not in ("point", "planned"):
            continue
        point, note = _point(load, record, points[0] if points else None)
        if point is not None:
            refuse_disturbed(load)
            notes += _meter_notes(load)
            points.append(point)
        if note is not None and note not in notes:
            notes.append(note)
    if (note := _reported_note(record)) is not None:
        notes.append(note)
    if any(point.basis == "device-delta" for point in points):
        _refuse_moved_baseline(record)
    for part in ("kv_cache_type", "flash_attention", "parallel", "basis"):
        values = {getattr(point, part) for point in points} - {None}
        if len(values) > 1:
            listed = ", ".join(sorted(str(value) for value in values))
            raise UntrustedError(f"the loads ran with different {part}: {listed}", code="settings-differ")
    reading = READING_ERROR.get(record.machine.meter, MIB)
    kept = _of_equal_weights(points, notes)
    on_host = record.machine.meter == "host"
    kept = (
        with_bookkeeping(without_room(kept, record, notes), record.engine.version or "") if on_host else with_full_pools(kept)
    )
    return with_growth(kept, reading), notes


def _of_equal_weights(points: list[Point], notes: list[str]) -> list[Point]:
    """Only the points with the most weights on the target: an output layer that stays on the host at one load moves base."""
    most = max((point.weights for point in points), default=0.0)
    kept = [point for point in points if most - point.weights <= max(MIB, 2 * point.uncertainty)]
    notes.extend(
        f"context {point.context:,}: not a point of the fit ({(most - point.weights) / MIB:.0f} MiB of weights are elsewhere)"
        for point in points
        if point not in kept
    )
    return kept


def _point(load: Load, record: Record, made: Point | None = None) -> tuple[Point | None, str | None]:
    """``made`` is the load that was made where others are planned: they have its overhead."""
    asked = f"context {load.request.context:,}"
    if load.outcome in ("failed", "skipped", "wont-fit"):
        why = load.reason or load.outcome
        return None, why if f"{load.request.context} tokens" in why.replace(",", "") else f"{asked}: {why}"
    facts = load.facts
    if facts is None:
        return None, f"{asked}: no log was read"
    target = record.machine.target
    ready = load.ready is not None or record.machine.meter == "import"  # whoever read its memory saw it
    if (reason := spill_reason(facts, target, ready=ready)) is not None:
        return None, f"{asked}: not a point of the fit ({reason})"
    if record.machine.meter not in BY_LOG and not understood(facts):
        return None, f"{asked}: the log was not understood"
    batch, wanted = facts.num_batch, load.request.num_batch
    if batch is not None and wanted is not None and batch != wanted:
        return None, f"{asked}: not a point of the fit (the engine ran it with batch {batch}, not {wanted})"
    parallel = facts.parallel or record.settings.num_parallel
    cells = facts.context_cells
    context = cells // parallel if cells else load.request.context
    kind: DeviceKind | None = "gpu" if target == "gpu" else None
    weights = _part(facts, ("weights_bytes", "lora_bytes", "projector_bytes"), kind)
    compute = _part(facts, ("compute_bytes", "output_bytes"), kind)
    kv, recurrent = _part(facts, ("kv_cache_bytes",), kind), _part(facts, ("recurrent_bytes",), kind)
    window, window_cells = _window(facts, kind, parallel)
    logged = weights + compute + kv + recurrent
    note = _host_weights(facts, target, asked) or _shared(facts, parallel)
    basis: str | None = None
    idle = load.idle.total_bytes if load.idle is not None and record.machine.meter == "nvml" else None
    planned = load.request.purpose == "planned"
    if record.machine.meter == "log":
        total, overhead = float(logged), None
    elif planned and made is not None and made.overhead is not None:
        overhead = made.overhead
        total, idle = logged + overhead, None if made.idle_overhead is None else round(logged + made.idle_overhead)
    else:
        plateau = _plateau(load, record)
        if plateau is None or plateau.total_bytes is None:
            why = (plateau.reason if plateau else None) or "no plateau was read"
            return None, f"{asked}: the meter has no reading ({why})"
        total, basis = float(plateau.total_bytes), plateau.basis
        overhead = total - logged
    return (
        Point(
            context=context,
            parallel=parallel,
            num_batch=wanted if batch is None else batch,
            weights=weights,
            kv_per_slot=(kv - window) / parallel,
            window=window / parallel,
            window_cells=window_cells,
            cells=sum((cache.cells or 0) * cache.streams for cache in facts.caches) / parallel,
            recurrent=recurrent / parallel,
            compute=compute,
            total=total,
            overhead=overhead,
            filled=load.prompt_tokens,
            idle_overhead=None if idle is None else idle - logged,
            planned=planned,
            kv_cache_type=facts.kv_cache_type,
            flash_attention=facts.flash_attention,
            basis=basis,
            uncertainty=facts.uncertainty_bytes,
        ),
        note,
    )


def planned_buffers(record: Record) -> dict[int | None, list[Knot]]:
    """What an engine has planned of compute buffers at other contexts than were loaded, by physical batch."""
    kind: DeviceKind | None = "gpu" if record.machine.target == "gpu" else None
    found: dict[int | None, list[Knot]] = {}
    for load in record.loads:
        if load.request.purpose == "buffers" and load.facts is not None:
            compute = float(_part(load.facts, ("compute_bytes", "output_bytes"), kind))
            found.setdefault(load.request.num_batch, []).append((load.request.context, compute))
    return found


def _plateau(load: Load, record: Record) -> Plateau | None:
    """The plateau that counts: after a prompt on a GPU, idle on the host."""
    return load.busy if record.machine.target == "gpu" else load.idle


def measured_total(load: Load, record: Record) -> float | None:
    """Bytes on the target as the meter saw them; ``None`` without a reading."""
    plateau = _plateau(load, record)
    return None if plateau is None or plateau.total_bytes is None else float(plateau.total_bytes)


def logged_bytes(load: Load, record: Record) -> int:
    """Bytes on the target that the log names."""
    kind: DeviceKind | None = "gpu" if record.machine.target == "gpu" else None
    return 0 if load.facts is None else _part(load.facts, _ALL_PARTS, kind)


def understood(facts: LoadFacts | None) -> bool:
    """Whether a log names what every load has: weights, and buffers to compute in."""
    if facts is None:
        return False
    if facts.estimated or facts.in_blocks:
        return True
    return facts.total("weights_bytes") is not None and facts.total("compute_bytes") is not None


def refuse_disturbed(load: Load) -> None:
    """Refuse a point that is the rise of a whole GPU, while another process used it, or its baseline did not come back.

    A figure of the engine's own processes is not touched by what others do.

    Raises:
        UntrustedError: with what was seen.
    """
    asked = f"context {load.request.context:,}"
    plateau = load.busy or load.idle
    if plateau is None or plateau.basis != "device-delta":
        return
    if who := _who_moved(load):
        raise UntrustedError(
            f"{asked}: another process changed its GPU memory during the measurement ({who})",
            hint="close what else uses the GPU, or name another one with --gpus, and calibrate again",
            code="stranger-moved",
        )
    if load.left_bytes:
        raise UntrustedError(
            f"{asked}: the GPU still held {format_size(load.left_bytes)} after the model was unloaded, so what it "
            "rose by is not the model's alone",
            hint="close what else uses the GPU, and calibrate again",
            code="baseline-moved",
        )


def _who_moved(load: Load) -> str:
    moved = load.trace.moved if load.trace is not None else {}
    return ", ".join(f"process {pid} by {format_size(size)}" for pid, size in sorted(moved.items()))


def _refuse_moved_baseline(record: Record) -> None:
    """Refuse differences from a baseline that is no longer there when the run is over."""
    before, after = record.before, record.after
    if before is None or after is None:
        return
    for uuid, size in before.devices.items():
        if abs(after.devices.get(uuid, size) - size) > BASELINE_TOLERANCE:
            raise UntrustedError(
                f"the GPU held {format_size(size)} before the run and {format_size(after.devices[uuid])} after it, so what it "
                "rose by is not the model's alone",
                hint="close what else uses the GPU, and calibrate again",
                code="baseline-moved",
            )


def _meter_notes(load: Load) -> list[str]:
    """What a reader of the figures should know about how a point was measured."""
    notes = []
    asked = f"context {load.request.context:,}"
    plateau = load.busy or load.idle
    if plateau is not None and plateau.basis == "device-delta":
        notes.append(f"{asked}: device-delta, the rise of the whole GPU ({plateau.reason})")
    elif who := _who_moved(load):
        notes.append(f"{asked}: another process changed its GPU memory meanwhile ({who}); the figures are the engine's own")
    if load.left_bytes:
        notes.append(f"{asked}: the GPU still held {format_size(load.left_bytes)} after the model was unloaded")
    return notes


def _reported_note(record: Record) -> str | None:
    """Where what the engine says of itself differs most from what its log adds up to; ``None`` where they agree.

    Ollama >= 0.30 reads its runner's log and keeps the last figure of a kind: of two caches it counts one.
    """
    worst, note = 0.0, None
    for load in record.loads:
        if load.reported is None or load.facts is None or load.outcome != "ok" or load.request.purpose != "point":
            continue
        gpu = record.machine.target == "gpu"
        said = load.reported.gpu_bytes if gpu else load.reported.total_bytes
        logged = _part(load.facts, _ALL_PARTS, "gpu" if gpu else None)
        if said is None or abs(said - logged) <= max(REPORTED_BYTES, REPORTED_SHARE * logged):
            continue
        if abs(said - logged) > worst:
            worst = abs(said - logged)
            note = (
                f"context {load.request.context:,}: the engine's own figure (/api/ps) is {said / MIB:.0f} MiB, its log adds up "
                f"to {logged / MIB:.0f} MiB; the log is used"
            )
    return note


def _part(facts: LoadFacts, parts: Sequence[str], kind: DeviceKind | None) -> int:
    return sum((facts.total(part, kind) or 0) for part in parts)


def _shared(facts: LoadFacts, parallel: int) -> str | None:
    """A note where slots share one cache: then windows and compute buffers do not go with the slots as the formula has it."""
    if parallel > 1 and facts.caches and all(cache.streams == 1 for cache in facts.caches):
        return f"{SHARED_CACHE}: the constants hold for {parallel} slots, and not for another number"
    return None


def _window(facts: LoadFacts, kind: DeviceKind | None, parallel: int) -> tuple[int, int | None]:
    """Bytes of the sliding-window caches on the target, and their cells of one slot (``None`` without such a cache).

    Slots that share one cache (a single stream, ``kv_unified``) have a part of its cells each.
    """
    caches = [cache for cache in facts.caches if cache.role == "window" and cache.cells is not None]
    size = sum(size for cache in caches for name, size in cache.devices.items() if kind is None or device_kind(name) == kind)
    cells = max(((cache.cells or 0) * cache.streams // parallel for cache in caches), default=None)
    return size, cells


def _host_weights(facts: LoadFacts, target: Target, asked: str) -> str | None:
    """A note where weights of a GPU load lie on the host (embeddings always do; an output matrix may)."""
    if target == "host":
        return None
    if facts.layers_offloaded is not None and facts.layers_offloaded == (facts.layers_total or 0) - 1:
        return f"{asked}: the output layer is not on the GPU"
    placed = [name for name, device in facts.devices.items() if name in ("AMX", "CPU_REPACK") and device.weights_bytes]
    if placed:
        size = sum(facts.devices[name].weights_bytes or 0 for name in placed) / MIB
        return f"{asked}: {size:.0f} MiB of weights beside the repeating layers lie on the host ({', '.join(placed)})"
    return None
