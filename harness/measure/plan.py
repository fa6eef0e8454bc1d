"""What a calibration will do, and what its record says of it: a function of what was asked and the engine's version. Pure."""

from __future__ import annotations

import msgspec

from harness.engines.base import Options, Source
from harness.engines.policy import Policy
from harness.engines.settings import recorded_flash, shown_env
from harness.errors import UsageError
from harness.fit.load_plan import DEFAULT_BATCH, DEFAULT_CONTEXTS, BatchLimits, still_covers
from harness.model.record import LoadRequest, Settings
from harness.units import CELL_PADDING


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to calibrate: ``name`` is what the user called the model, ``stem`` the name under which it is filed.

    ``contexts`` empty means the default plan. ``loads`` is a plan from before: it holds as long as the engine's rule asks
    for its batches, else ``contexts`` are planned anew.
    """

    name: str
    stem: str
    source: Source
    contexts: tuple[int, ...] = ()
    loads: tuple[LoadRequest, ...] = ()
    num_batch: int | None = None
    variant: str | None = None
    speed: bool = True
    force: bool = False


class CalibrationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration does. ``reserve_bytes`` is device memory that the engine keeps free (``None``: not known)."""

    settings: Settings
    batch_limits: BatchLimits
    reserve_bytes: int | None
    loads: tuple[LoadRequest, ...]
    notes: tuple[str, ...] = ()


def plan_calibration(policy: Policy, request: Request, options: Options, version: str | None = None) -> CalibrationPlan:
    """The plan for an engine of a version; for the newest where it is not known.

    Raises:
        UsageError: a context beyond the model's training context, or too small for a load of its own.
    """
    source, train = request.source, request.source.model.train_context
    beyond = [context for context in request.contexts if train is not None and context > train]
    if beyond:
        raise UsageError(
            f"{request.name} was trained on {train:,} tokens; a context of {max(beyond):,} is beyond that",
            hint=f"use --ctx up to {train}; a comma before three digits belongs to the number: '256 512' are two contexts",
            code="beyond-training",
        )
    contexts, notes = enough_contexts(request.contexts, request.num_batch, not policy.plans_anew)
    limits = policy.batch_limits(version, target=options.target, flash_attention=options.flash_attention)
    loads = policy.plan(
        contexts or DEFAULT_CONTEXTS, train, num_batch=request.num_batch, batch_limits=limits,
        num_parallel=options.num_parallel, embedding=source.embedding,
    )  # fmt: skip
    if request.loads and still_covers(request.loads, loads):
        loads = request.loads
    settings = Settings(
        num_parallel=options.num_parallel,
        num_batch=request.num_batch,
        kv_cache_type=options.kv_cache_type or policy.default_cache_type,
        flash_attention=recorded_flash(options.flash_attention),
        env=shown_env(options.env),
        vllm=policy.settings(source, options, request.num_batch),
    )
    reserve = policy.reserve_bytes(version, options.env, source.projector_bytes)
    return CalibrationPlan(settings=settings, batch_limits=limits, reserve_bytes=reserve, loads=loads, notes=notes)


def enough_contexts(
    asked: tuple[int, ...], num_batch: int | None = None, needs_a_line: bool = True
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The contexts that were asked for, with smaller ones where a single one gives no line, and what is to be said of that.

    Raises:
        UsageError: a context below what an engine allocates at least, or a single one that has no smaller one.
    """
    contexts, floor = tuple(sorted(set(asked))), max(num_batch or DEFAULT_BATCH, CELL_PADDING)
    notes = [f"--ctx names {context:,} more than once: it is loaded once" for context in contexts if asked.count(context) > 1]
    if contexts and contexts[0] < CELL_PADDING:
        raise UsageError(
            f"--ctx: {contexts[0]} tokens are fewer than {CELL_PADDING} cells, the least that an engine allocates",
            hint=f"--ctx {8 * floor},{16 * floor}",
            code="context-too-small",
        )
    if len(contexts) != 1 or not needs_a_line:
        return contexts, tuple(notes)
    (largest,) = contexts
    halves = [largest // part // CELL_PADDING * CELL_PADDING for part in (4, 2)]
    smaller = tuple(one for one in dict.fromkeys(halves) if floor <= one < largest)
    if not smaller:
        raise UsageError(
            f"--ctx: one context of {largest:,} tokens gives no line, and a smaller one is below a batch of {floor:,}",
            hint=f"--ctx '{largest} {2 * largest}', or --num-batch {largest // 2}",
            code="one-context",
        )
    named = " and ".join(f"{one:,}" for one in smaller)
    notes.append(f"one context is not enough for a line: {named} tokens are loaded too")
    return (*smaller, largest), tuple(notes)
