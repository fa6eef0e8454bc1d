"""``calibrate --quick``: one load is made, and the engine's plan says how the others differ from it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from harness.engines.base import Options, Source
from harness.errors import UnavailableError, UntrustedError, UsageError
from harness.measure.buffers import planner_of
from harness.model.facts import CacheFacts, DeviceFacts, LoadFacts
from harness.model.planned import PlannedLoad
from harness.model.record import Load, LoadRequest, Target

#: A plan that is further off the load that was made is not one of this engine, relative.
LARGEST_ERROR = 0.02


def check_quick(options: Options, source: Source) -> None:
    """Refuse what a plan cannot speak for, before anything is started.

    Raises:
        UsageError: settings that the planner does not have, or no header to plan from.
    """
    if source.plan_path is None:
        raise UsageError(
            "--quick plans from the header of a GGUF, and none is here", hint="give a .gguf file, or add --header-only",
            code="no-header",
        )  # fmt: skip
    if by_env := sorted(name for name in options.env if name.startswith("LLAMA_ARG_")):
        raise UsageError(f"--quick plans without {by_env[0]}: its plan would be of another load", code="no-quick")
    if options.flash_attention == "off" and options.target == "gpu":
        raise UsageError("--quick needs flash attention: without it driver pools grow, which no plan names", code="no-quick")


def first_load(planned: Sequence[LoadRequest]) -> LoadRequest:
    """The load that is made: the smallest of the batch of the largest contexts."""
    return min((one for one in planned if one.num_batch == planned[-1].num_batch), key=lambda one: one.context)


def planned_loads(
    real: Load, requests: Sequence[LoadRequest], source: Source, options: Options, target: Target
) -> tuple[list[Load], float]:
    """The other loads, each as the one that was made with what its plan adds; and how far the plan of that one was off.

    Raises:
        UnavailableError: no engine here can plan. UntrustedError: its plan is not that of the engine that was measured.
    """
    planner = planner_of(source, options)
    assert planner is not None  # noqa: S101 - check_quick has seen it
    planner.prepare([real.request, *requests])
    before = planner.plan(real.request)
    if before is None or real.facts is None:
        raise UnavailableError(
            "no engine here can plan a load without making it", hint="install the extra 'embedded', or leave out --quick",
            code="no-planner",
        )  # fmt: skip
    name, device = _device(real.facts, target)
    error = _error(device, before)
    if error > LARGEST_ERROR:
        raise UntrustedError(
            f"the plan of {real.request.context:,} tokens is off by {error:.1%} of what the load then took",
            hint="calibrate without --quick",
            code="plan-differs",
        )
    loads = []
    for request in requests:
        plan = planner.plan(request)
        if plan is not None:
            facts = _moved(real.facts, name, device, before, plan, request)
            asked = msgspec.structs.replace(request, purpose="planned")
            loads.append(Load(request=asked, outcome="ok", facts=facts, ready=0.0))
    return loads, round(error, 6)


def _device(facts: LoadFacts, target: Target) -> tuple[str, DeviceFacts]:
    """The device of the target with the most weights."""
    mine = [(name, one) for name, one in facts.devices.items() if target == "host" or one.kind == "gpu"]
    return max(mine, key=lambda pair: pair[1].weights_bytes or 0)


def _caches(plan: PlannedLoad) -> int:
    return sum(cache.total_bytes for cache in plan.caches)


def _error(device: DeviceFacts, plan: PlannedLoad) -> float:
    """Caches and compute as planned against what was logged, relative to all of the load."""
    parts = ("weights_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes")
    whole = sum(getattr(device, part) or 0 for part in parts)
    made = whole - (device.weights_bytes or 0)
    return abs(_caches(plan) + plan.recurrent_bytes + plan.compute_bytes - made) / max(whole, 1)


def _moved(
    facts: LoadFacts, name: str, device: DeviceFacts, before: PlannedLoad, plan: PlannedLoad, request: LoadRequest
) -> LoadFacts:
    more = _caches(plan) - _caches(before)
    moved = msgspec.structs.replace(
        device,
        kv_cache_bytes=None if device.kv_cache_bytes is None else device.kv_cache_bytes + more,
        compute_bytes=(device.compute_bytes or 0) + plan.compute_bytes - before.compute_bytes,
    )
    caches = tuple(
        CacheFacts(cells=one.cells, streams=one.streams, layers=one.layers, role=one.role, devices={name: one.total_bytes})
        for one in plan.caches
    )
    cells = max(((one.cells or 0) * one.streams for one in caches), default=request.context * (facts.parallel or 1))
    return msgspec.structs.replace(
        facts, devices={**facts.devices, name: moved}, caches=caches, context_cells=cells, num_batch=request.num_batch
    )
