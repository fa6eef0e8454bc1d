"""Speeds and placement of a calibration, from a record's loads."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

import msgspec

from harness.fit.observations import spill_reason
from harness.model.calibration import (
    MOST_UNCERTAINTY,
    SPEED_UNCERTAINTY,
    Calibration,
    DepthSpeed,
    Performance,
    Placement,
    SetCompute,
    SplitCompute,
)
from harness.model.record import Load, Record, Speed, Tensors
from harness.units import MIB, TOKENS_PER_UNIT, from_gib, gib

#: Prompts of which the longer is at most this much longer are of one depth.
SAME_DEPTH: Final = 1.25
#: Twice the distance of three timings bounds their mean at 95 % (Student's t of two degrees of freedom, 4.30, by their
#: standard deviation, range / 1.69, and the root of 3: 1.47); of two it takes 6.35 times (t of one: 12.71, halved).
_TWO: Final = 2
_OF_TWO: Final = 3.18
#: How the note begins that says which run timed the speeds of a calibration, where it was not its own.
_KEPT: Final = "speeds are those of run"


def fit_performance(record: Record) -> tuple[Performance, list[str]]:
    """Speeds of the run; what was not measured is ``None``, with its reason in the notes."""
    notes: list[str] = []
    speed = _first(record, "speed")
    host = _first(record, "host-speed")
    timed = [] if speed is None else [one for one in speed.speeds if one.decode_tokens_per_s]
    timed.sort(key=lambda one: one.prompt_tokens)
    if speed is None:
        why = "only the header was here, and zeros for weights" if record.weights == "header" else "not asked for"
        notes.append(f"speed was not measured: {why}")
    elif not timed:
        notes.append(f"speed was not measured: {speed.reason or 'no timings'}")
    depths, spread = _depths(timed)
    cause = "repeated timings differ"
    if speed is not None and record.machine.target == "host" and speed.cpu_by_others is not None:
        # What others took of the CPU, the engine might have had.
        others = round(speed.cpu_by_others / max(1.0 - speed.cpu_by_others, 0.01), 4)
        if others > (spread or 0.0):
            spread, cause = others, f"other processes took {speed.cpu_by_others:.0%} of the CPU while it was timed"
    prompts = [one.prompt_tokens_per_s for one in timed if one.prompt_tokens_per_s]
    on_host = [one.decode_tokens_per_s for one in host.speeds if one.decode_tokens_per_s] if host else []
    host_decode = median(on_host) if on_host else None
    if record.machine.target == "host":
        host_decode = depths[0].decode_tokens_per_s if depths else None
    elif host_decode is None:
        notes.append(f"speed on the host alone was not measured: {(host and host.reason) or 'not asked for'}")
    if host is not None and record.machine.target == "gpu" and repeats_differ(host.speeds):
        host_decode = None
        notes.append("speed on the host alone is not given: its repeats differ too much")
    found = Performance(
        load_s=_seconds(speed),
        prompt_tokens_per_s=round(max(prompts), 2) if prompts else None,
        decode_tokens_per_s=depths[0].decode_tokens_per_s if depths else None,
        host_decode_tokens_per_s=_rounded(host_decode),
        depths=depths,
        spread=spread,
    )
    if found.bounded != found:
        notes.append(
            f"speed is not given: {cause}, so it may be off by {found.uncertainty:.0%}; the limit is {MOST_UNCERTAINTY:.0%}"
        )
    return found.bounded, notes


def with_speeds_of(new: Calibration, old: Calibration) -> Calibration:
    """``new`` with the speeds of ``old``, where the same weights, engine, settings and machine were measured; else as it is."""
    first, second = old.metadata, new.metadata
    timed = (first.performance.decode_tokens_per_s, first.performance.prompt_tokens_per_s)
    same = first.model.digest == second.model.digest is not None and all(
        getattr(first, part) == getattr(second, part) for part in ("engine", "settings", "machine")
    )
    if not same or not any(timed):
        return new
    spoken = [note for note in first.quality.notes if note.startswith("speed")]
    if not any(note.startswith(_KEPT) for note in spoken):
        spoken.append(f"{_KEPT} {first.run or 'a run that is not known'}: weights, engine and settings are the same")
    notes = (*(note for note in second.quality.notes if not note.startswith("speed")), *spoken)
    quality = msgspec.structs.replace(second.quality, notes=notes)
    return msgspec.structs.replace(
        new, metadata=msgspec.structs.replace(second, performance=first.performance, quality=quality)
    )


def _depths(timed: Sequence[Speed]) -> tuple[tuple[DepthSpeed, ...], float | None]:
    """The median decode speed at each depth, shallow first, and the widest spread of repeats (largest - smallest) / median.

    ``timed`` is in order of depth. Prompts made of words are a few tokens longer or shorter each time: a repeat is within a
    quarter of the first.
    """
    groups: list[list[Speed]] = []
    for one in timed:
        if groups and one.prompt_tokens <= SAME_DEPTH * groups[-1][0].prompt_tokens:
            groups[-1].append(one)
        else:
            groups.append([one])
    depths, spreads = [], []
    for group in groups:
        middle = median(closest(_rates(group)))
        depths.append(DepthSpeed(depth=int(median(one.prompt_tokens for one in group)), decode_tokens_per_s=round(middle, 2)))
        if len(group) > 1:
            spreads.append(spread_of(_rates(group)))
    return tuple(depths), round(max(spreads), 4) if spreads else None


def closest(rates: Sequence[float]) -> list[float]:
    """The three quarters of some repeats that are closest to each other, in ascending order; all of up to three.

    What disturbed a few of many repeats was not the engine.
    """
    ordered, count = sorted(rates), -(-3 * len(rates) // 4)
    starts = range(len(ordered) - count + 1)
    best = min(starts, key=lambda start: ordered[start + count - 1] - ordered[start], default=0)
    return ordered[best : best + count]


def repeats_differ(speeds: Sequence[Speed]) -> bool:
    """Whether timings of one prompt differ so much that no speed would be given."""
    return 2 * spread_of(_rates(speeds)) > MOST_UNCERTAINTY


def repeats_agree(speeds: Sequence[Speed]) -> bool:
    """Whether another timing of one prompt is not needed: two give the least bound there is, or more give one at all."""
    rates = _rates(speeds)
    enough = SPEED_UNCERTAINTY if len(rates) == _TWO else MOST_UNCERTAINTY
    return len(rates) >= _TWO and 2 * spread_of(rates) <= enough


def spread_of(rates: Sequence[float]) -> float:
    """Half the bound that timings of one prompt give its speed, relative: how far they lie apart; 0 for one timing."""
    kept = closest(rates)
    apart = (kept[-1] - kept[0]) / median(kept) if kept else 0.0
    return apart * _OF_TWO if len(kept) == _TWO else apart


def _rates(speeds: Sequence[Speed]) -> list[float]:
    return [one.decode_tokens_per_s for one in speeds if one.decode_tokens_per_s]


def fit_placement(record: Record) -> Placement:
    """What decides how many layers stay on a GPU; ``None`` parts where the record does not tell them."""
    tensors = record.tensors
    grid = tuple(
        SplitCompute(
            layers=load.request.gpu_layers,
            context=load.request.context,
            compute_gb=gib(sum(row.compute_bytes for row in load.facts.fit.rows if row.free_bytes is not None)),
            experts_on_host=load.request.experts_on_host,
        )
        for load in record.loads
        if load.request.purpose == "dry-run"
        and load.request.gpu_layers is not None
        and not load.request.split
        and load.facts is not None
        and load.facts.fit is not None
        and load.facts.fit.rows
    )
    kinds = next((load.facts.layer_kinds for load in record.loads if load.facts and load.facts.layer_kinds), None)
    experts = tensors.expert_bytes if tensors else ()
    estimate = record.estimate
    return Placement(
        reserve_gb=None if record.reserve_bytes is None else gib(record.reserve_bytes),
        layer_weights_gb=None if tensors is None else gib(sum(tensors.layer_bytes)),
        output_weights_gb=None if tensors is None else gib(tensors.output_bytes),
        split_compute=grid if len(record.machine.gpus) < 2 else (),
        set_compute=_set_compute(record),
        layer_kinds=kinds,
        layers_gb=_layers_gb(tensors),
        experts_gb=tuple(gib(size) for size in experts),
        expert_use=tensors.expert_use if tensors and experts else None,
        width=tensors.width if tensors else None,
        estimate_base_gb=None if estimate is None else gib(estimate.file_bytes),
        estimate_gb_per_10k=None if estimate is None else gib(estimate.cache_bytes_per_token * TOKENS_PER_UNIT),
        start_gb=_start_gb(record),
        host_gb=_host_gb(record),
    )


def _host_gb(record: Record) -> float | None:
    """What a load that is on the GPU takes of host memory by its log, at most; ``None`` where no log says it.

    Weights that were put there by choice (``--n-cpu-moe``, ``-ot``) count: such a load is a point all the same.
    """
    parts = ("weights", "lora", "projector", "kv_cache", "recurrent", "compute", "output")
    found = [
        sum(load.facts.total(f"{part}_bytes", "host") or 0 for part in parts)
        for load in record.loads
        if load.request.purpose == "point" and load.outcome == "ok" and load.facts is not None
        if spill_reason(load.facts, "gpu", ready=True) is None
    ]
    return gib(max(found)) or None if found and record.machine.target == "gpu" else None


def _set_compute(record: Record) -> tuple[SetCompute, ...]:
    """What dry runs of splits over several devices say of each, by split: to 0.01 MiB, else the middle of a whole MiB."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, tuple[float, ...]]] = {}
    for load in record.loads:
        rows = () if load.facts is None or load.facts.fit is None else load.facts.fit.rows
        sizes = tuple(gib(row.reserved_bytes or row.compute_bytes + MIB // 2) for row in rows if row.free_bytes is not None)
        asked = load.request
        if asked.split and len(asked.split) == len(sizes):
            found.setdefault((asked.split, asked.without_experts), {})[asked.context] = sizes
    return tuple(
        SetCompute(layers=layers, partial=partial, contexts=tuple(sizes), compute_gb=tuple(sizes.values()))
        for (layers, partial), sizes in found.items()
    )


def _start_gb(record: Record) -> float | None:
    """What the engine had taken of its only GPU when it read what was free; ``None`` where one of the figures is not known.

    The projection in its log names what was free then, in whole MiB; the baseline of the run what was free before.
    """
    gpus, before = record.machine.gpus, record.before
    if len(gpus) != 1 or gpus[0].memory_gb is None or before is None or len(before.devices) != 1:
        return None
    free = from_gib(gpus[0].memory_gb) - sum(before.devices.values())
    found = [
        free - load.facts.fit.free_bytes
        for load in record.loads
        if load.facts is not None and load.facts.fit is not None and load.facts.fit.free_bytes is not None
    ]
    taken = median(found) if found else 0
    return gib(taken) if taken > 0 else None


def _layers_gb(tensors: Tensors | None) -> tuple[float, ...]:
    """Weights of each layer without its experts."""
    if tensors is None:
        return ()
    experts = tensors.expert_bytes or (0,) * len(tensors.layer_bytes)
    return tuple(gib(whole - part) for whole, part in zip(tensors.layer_bytes, experts, strict=True))


def _first(record: Record, purpose: str) -> Load | None:
    """The first successful load of a purpose, or else the last one that says why there is none."""
    loads = [load for load in record.loads if load.request.purpose == purpose]
    return next((load for load in loads if load.speeds), loads[-1] if loads else None)


def _seconds(load: Load | None) -> float | None:
    if load is None or load.ready is None:
        return None
    return round(load.ready - load.started, 2)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
