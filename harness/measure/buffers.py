"""Compute buffers at contexts that were not loaded, as the embedded engine plans them for host memory, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from harness.engines.base import Options, Source
from harness.fit.knots import Knot, first_contexts, missing
from harness.fit.lines import ROUNDING
from harness.headers.planning import Planner
from harness.model.facts import DeviceFacts, LoadFacts
from harness.model.record import Load, LoadRequest
from harness.units import pad_cells

#: Plans are made until each line is known, and no more than these (seen: 34 of 21 models and settings).
MOST_PLANS: Final = 64


def planner_of(source: Source, options: Options) -> Planner | None:
    """The planner of a source's header; ``None`` without one, or where variables set what no plan has."""
    path = source.plan_path or source.path
    if path is None or any(name.startswith("LLAMA_ARG_") for name in options.env):
        return None
    state = path.stat()
    return Planner(path, f"{path}:{state.st_size}:{state.st_mtime_ns}", options)


def buffers_of(made: Sequence[Load], planner: Planner, most: int) -> list[Load]:
    """Plans of compute buffers from one batch to ``most`` tokens per slot; none where a plan of a load is not what it was.

    ``made`` are points of one physical batch, on host memory.
    """
    first = made[0]
    if first.facts is None or first.request.num_batch is None or not planner.prepare([load.request for load in made]):
        return []
    for load in made:
        if (off := _off(load, planner)) is None or off > ROUNDING:
            return []
    batch, known = first.request.num_batch, dict[int, float]()
    wanted = first_contexts(pad_cells(batch), pad_cells(most))
    while wanted and len(known) < MOST_PLANS:
        requests = [LoadRequest(context=context, num_batch=batch, purpose="buffers") for context in wanted]
        if not planner.prepare(requests):
            return []
        known |= {one.context: plan.compute_bytes for one in requests if (plan := planner.plan(one)) is not None}
        wanted = missing(list(known.items()))
    before = planner.plan(first.request)
    more = 0 if before is None else -before.compute_bytes
    return [_load(first.facts, knot, batch, more) for knot in sorted(known.items())]


def _off(load: Load, planner: Planner) -> float | None:
    """How far a plan is off the caches and compute of a load, bytes."""
    plan = planner.plan(load.request)
    if plan is None or load.facts is None:
        return None
    caches = sum(cache.total_bytes for cache in plan.caches)
    compute, kept = load.facts.total("compute_bytes") or 0, load.facts.total("kv_cache_bytes") or 0
    return max(abs(plan.compute_bytes - compute), abs(caches - kept))


def _load(facts: LoadFacts, knot: Knot, batch: int, more: int) -> Load:
    context, compute = knot
    largest = max(facts.devices, key=lambda name: facts.devices[name].compute_bytes or 0)
    devices = {
        name: DeviceFacts(
            kind=one.kind,
            compute_bytes=(one.compute_bytes or 0) + (round(compute) + more if name == largest else 0),
            output_bytes=one.output_bytes,
        )
        for name, one in facts.devices.items()
    }
    planned = LoadFacts(engine=facts.engine, dialect=facts.dialect, num_batch=batch, devices=devices)
    return Load(request=LoadRequest(context=context, num_batch=batch, purpose="buffers"), outcome="ok", facts=planned)
