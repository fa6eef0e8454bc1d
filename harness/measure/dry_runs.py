"""Dry runs: what the engine estimates for a number of layers on the GPU, without loading weights.

llama-server prints the memory of a layout (``--fit on``, one MiB a row) before it loads, and is ended then; with remote
devices once it answers. A dry run that says nothing is an observation like any other and never fails a calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from harness.engines.base import Source
from harness.errors import EngineError, WontFitError
from harness.measure.engine_log import read_facts
from harness.measure.load import LoadRunner
from harness.model.record import Load, LoadRequest, Record
from harness.polling import poll
from harness.prediction.device_compute import plan_sets
from harness.prediction.placement import DRY_RUNS, plan_dry_runs
from harness.sandboxes.base import Running
from harness.sandboxes.tail import last_lines

#: How long a dry run may take, seconds; the largest models take a few.
TIMEOUT: Final = 60.0
#: How long the dry runs of splits over several devices may take together, seconds; each layout is finished.
SETS_LIMIT: Final = 90.0
#: Contexts beyond this are not tried: no model is split for them.
LARGEST: Final = 262_144
_DONE: Final = b"common_fit_params: "


def measure_splits(runner: LoadRunner, source: Source, record: Record, add: Callable[[Load], None]) -> str | None:
    """Make the dry runs of a calibration; the first tells what kinds of layers there are, the others follow from it.

    Returns:
        What has to be said of those that were not made.
    """
    layers, top = record.model.layers, record.model.train_context
    if record.machine.target != "gpu" or not runner.engine.policy.has_dry_runs or not layers:
        return None
    top = min(top or max(load.request.context for load in record.loads), LARGEST)
    contexts = [max(top // part // 256 * 256, 256) for part in (16, 4, 1)]
    moe = source.tensors is not None and any(source.tensors.expert_bytes)
    batch = record.settings.num_batch
    first = dry_run(runner, source, plan_dry_runs(None, layers, contexts, moe=moe, num_batch=batch)[0])
    add(first)
    kinds = first.facts.layer_kinds if first.facts else None
    if (devices := len(record.machine.gpus)) > 1:
        contexts = sorted({max(top // part // 256 * 256, 256) for part in (64, 16, 4, 2, 1)})
        return _measure_sets(runner, source, kinds or "f" * layers, devices, contexts, batch, add)
    planned = [one for one in plan_dry_runs(kinds, layers, contexts, moe=moe, num_batch=batch) if one != first.request]
    for request in planned[: DRY_RUNS - 1]:
        add(dry_run(runner, source, request))
    return None


def _measure_sets(
    runner: LoadRunner,
    source: Source,
    kinds: str,
    devices: int,
    contexts: Sequence[int],
    num_batch: int | None,
    add: Callable[[Load], None],
) -> str | None:
    """What splits over several devices cost on each: as many of them as :data:`SETS_LIMIT` leaves time for."""
    moe = source.tensors is not None and any(source.tensors.expert_bytes)
    began = runner.now()
    layouts = plan_sets(kinds, devices, moe=moe)
    for done, layout in enumerate(layouts, 1):
        runner.observer.progress(f"dry runs of splits over {devices} devices", done - 1, len(layouts))
        split, without = tuple(part.layers for part in layout), tuple(part.partial for part in layout)
        for context in dict.fromkeys(contexts):
            load = dry_run(
                runner,
                source,
                LoadRequest(
                    context=context, num_batch=num_batch, purpose="dry-run", gpu_layers=sum(split), split=split,
                    without_experts=without if any(without) else (),
                ),
            )  # fmt: skip
            add(load)
        if load.outcome == "failed" or (runner.now() - began > SETS_LIMIT and done < len(layouts)):
            why = "the last one failed" if load.outcome == "failed" else f"{SETS_LIMIT:.0f} s were over"
            return (
                f"dry runs of {done} of {len(layouts)} splits over {devices} devices were made ({why}): compute buffers of the "
                "others are taken from the most similar of them"
            )
    return None


def dry_run(runner: LoadRunner, source: Source, request: LoadRequest) -> Load:
    """Start the engine, wait until it has printed its estimate, and end it."""
    started = runner.now()
    reason = None
    log = None
    try:
        running = runner.launch(source, request)
        log = running.log
        reason = _await_breakdown(runner, running)
    except (EngineError, WontFitError) as error:
        reason = error.message
    finally:
        runner.stop()
    facts = None if log is None else read_facts(log, 0, None, runner.engine.policy)
    if facts is None or facts.fit is None or not facts.fit.rows:
        reason = reason or "the engine printed no memory breakdown"
    return Load(
        request=request,
        outcome="failed" if reason else "ok",
        reason=reason,
        log=None if log is None else log.name,
        log_end=log.stat().st_size if log is not None and log.exists() else None,
        facts=facts,
        started=started,
        ended=runner.now(),
    )


def _await_breakdown(runner: LoadRunner, running: Running) -> str | None:
    """Why there is none; ``None`` when the engine is through with fitting, and may be ended."""
    ending = runner.engine.ends_dry_runs(runner.options)
    ended = printed = False

    def over() -> bool:
        nonlocal ended, printed
        ended = running.exit_status() is not None  # first: the log of an engine that has ended is complete
        printed = running.log.exists() and _DONE in running.log.read_bytes()
        return ended or (printed and ending == "printed")

    if ending == "ready":
        with suppress(EngineError, WontFitError):  # it printed before it ran out of memory, or did not: seen below
            runner.await_ready(running)
        ending = "printed"
    poll(over, limit=TIMEOUT, every=0.01)
    if printed:
        return None
    if ended:
        return (last_lines(running.log, 1) or ("the engine ended",))[0]
    return f"no memory breakdown within {TIMEOUT:.0f} s"
