"""The public functions of :mod:`harness`. The command line is made of the same ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.engines.settings import asked_flash
from harness.errors import UsageError, refuse_other_systems
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.options import ALL_LAYERS, Allowed, QueryOptions, RunOptions, TuneOptions, read_available
from harness.prediction.memory import Prediction
from harness.prediction.memory import predict as _predict
from harness.store.store import Store, default_root

if TYPE_CHECKING:
    from harness.measure.calibrate import Result
    from harness.measure.events import Observer
    from harness.model.facts import LoadFacts
    from harness.prediction.allocation import Allocation
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.check import Assessment, Check
    from harness.serving.config_export import Exported
    from harness.serving.server import OnOffload, Server
    from harness.serving.tuning import Tuned

#: Free memory: ``None`` reads it now; ``"24GiB"`` or ``"24GiB,24GiB"``, bytes, or bytes of each device.
Available = str | int | Sequence[int] | None


def calibrate(
    model: str | None = None,
    *,
    contexts: Sequence[int] = (),
    store: str | Path | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Result:
    """Measure a model in a clean engine, write its calibration and keep the record.

    Args:
        model: a name of the catalog, the engine's own name, or the path of a GGUF file; ``None``: the embedded one.
        contexts: tokens per slot of each load; empty: three loads up to 32 768, or to the training context.
        store: the folder of calibrations and runs.
        observer: hears of the progress.
        options: the other options of ``harness calibrate``, by their names; those of :class:`harness.options.RunOptions`.

    Returns:
        Paths of the artifact and of the record, and the calibration itself.

    Raises:
        HarnessError: by its class as the exit codes say; ``UntrustedError`` where what was measured is not to be trusted.
    """
    refuse_other_systems()
    from harness.measure.events import Observer
    from harness.measure.prepare import prepare

    session = prepare(RunOptions(model=model, contexts=tuple(contexts), **options), _store(store), Path.cwd())
    return session.calibrate(observer or Observer())


def load_calibration(
    model: str,
    *,
    engine: EngineName | None = None,
    variant: str | None = None,
    store: str | Path | None = None,
) -> Calibration:
    """The calibration of a model (a name, an id such as ``ollama/qwen2.5-0.5b``, or a path).

    It is the variant asked for, else the one of this machine's GPU, else the default file.

    Raises:
        NotFoundError: there is none. UsageError: several engines have one. BadInputError: the file is damaged. ConfigError: its
            schema is newer than this program.
    """
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.figures import load

    return load(model, _store(store), CalibrationFilter(engine=engine, variant=variant))[1]


def predict(
    model: str | Calibration,
    ctx: int,
    *,
    num_parallel: int = 1,
    engine: EngineName | None = None,
    variant: str | None = None,
    kv_cache_type: str | None = None,
    flash_attention: Literal["enabled", "disabled"] | None = None,
    num_batch: int | None = None,
    store: str | Path | None = None,
) -> Prediction:
    """Memory by part (bytes) and speeds at ``ctx`` tokens per slot, from the calibration alone: nothing is started or read.

    Beyond the calibrated range it answers with ``within_range=False`` and a warning. Settings are those of
    :func:`check`: of a variant that has them, else derived (``source``, and a warning that says how), else refused.

    Raises:
        ValueError: ``ctx`` or ``num_parallel`` below one. UsageError: more slots than the engine can have, or a setting that
            cannot be. UnknownVerdictError: the settings do not follow from what was measured. Otherwise as
            :func:`load_calibration`.
    """
    import msgspec

    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.figures import as_asked, load_as_asked

    wanted = CalibrationFilter.of(
        QueryOptions(
            engine=engine or "auto", variant=variant, kv_cache_type=kv_cache_type, flash_attention=asked_flash(flash_attention),
            num_batch=num_batch,
        )
    )  # fmt: skip
    if isinstance(model, str):
        found = load_as_asked(model, _store(store), wanted, num_parallel)
    else:
        found = as_asked(model, wanted, num_parallel, model.id)
    prediction = _predict(found.calibration, ctx, num_parallel)
    return msgspec.structs.replace(prediction, source=found.source, warnings=(*found.notes, *prediction.warnings))


def surroundings(**given: Any) -> dict[str, Any]:
    """What ``HARNESS_…`` variables and the nearest ``harness.toml`` say of a question, as arguments of :func:`check`.

    The command line takes them by itself; functions here take what they are given alone, but for the store. ``given`` are
    arguments of :func:`check` that come before what is set.

    Raises:
        UsageError: a variable is empty, or its value cannot be. ConfigError: the file's.
    """
    from harness.store.config import of_question

    return of_question(dict(os.environ), Path.cwd(), given)


def check(
    *models: str,
    ctx: int | None = None,
    num_parallel: int = 1,
    available: Available = None,
    gpu: str | None = None,
    engine: EngineName | None = None,
    variant: str | None = None,
    kv_cache_type: str | None = None,
    flash_attention: Literal["enabled", "disabled"] | None = None,
    extrapolate: bool = False,
    num_batch: int | None = None,
    gpu_layers: int | Literal["all"] | None = None,
    n_cpu_moe: int = 0,
    fit: Literal["on", "off"] = "on",
    reserve: str | int | None = None,
    host_available: str | int | None = None,
    measured_only: bool = False,
    store: str | Path | None = None,
) -> Check:
    """Will it fit now, or be offloaded to the CPU? Several models are checked together, started in their order.

    Args:
        models: each ``MODEL``, ``MODEL@8192`` (a context) or ``MODEL@sha256:…`` (the exact weights).
        ctx: tokens per slot, where a model names none.
        num_parallel: slots.
        available: free memory instead of reading it.
        gpu: judge for this GPU: an index, a UUID, or the engine's name of it.
        engine: whose calibration, where several engines have one.
        variant: this variant of the calibration, whatever differs.
        kv_cache_type: the calibration with this KV cache.
        flash_attention: the calibration with this setting.
        extrapolate: answer beyond the calibrated range too.
        num_batch: the physical batch.
        gpu_layers: so many layers on the GPU, the output layer first, whatever the engine's rule would do.
        n_cpu_moe: the first layers whose experts are on the host.
        fit: ``off``: the engine moves nothing to the host.
        reserve: what the engine keeps free, instead of its own figure; bytes or a size.
        host_available: host memory beside ``available``; bytes or a size.
        measured_only: no estimates for models without a calibration.
        store: the folder of calibrations.

    Raises:
        UsageError: no context, nonsense, or several engines have a model. BadInputError, ConfigError: a file cannot be read.
    """
    return judge(
        models,
        QueryOptions(
            ctx=ctx, num_parallel=num_parallel, available=read_available(available), gpu=gpu, extrapolate=extrapolate,
            measured_only=measured_only,
            engine=engine or "auto", variant=variant, kv_cache_type=kv_cache_type, flash_attention=asked_flash(flash_attention),
            num_batch=num_batch, gpu_layers=ALL_LAYERS if gpu_layers == "all" else gpu_layers, n_cpu_moe=n_cpu_moe, fit=fit,
            reserve=_size(reserve), host_available=_size(host_available),
            store=None if store is None else str(store),
        ),
    )  # fmt: skip


def _size(size: str | int | None) -> int | None:
    """One size in bytes."""
    found = read_available(size)
    if found is not None and len(found) != 1:
        raise UsageError(f"one size is expected, not {size}")
    return None if found is None else found[0]


def judge(models: Sequence[str], query: QueryOptions) -> Check:
    """:func:`check`, with its options as one value."""
    from harness.inventory.machine import LocalMachine
    from harness.serving import check as workflow
    from harness.serving.calibration_lookup import CalibrationFilter, read_question

    questions = [read_question(spec, query.ctx, query.num_parallel) for spec in models]
    return workflow.check(
        questions, _store(query.store), LocalMachine(query.gpu), wanted=CalibrationFilter.of(query, surroundings=True),
        available=query.available, extrapolate=query.extrapolate, measured_only=query.measured_only,
    )  # fmt: skip


def tuned(model: str, demand: TuneOptions, query: QueryOptions) -> Tuned:
    """:func:`tune`, with its options as values."""
    from harness.inventory.machine import LocalMachine
    from harness.prediction.tuning import Demand
    from harness.serving import tuning as workflow
    from harness.serving.calibration_lookup import CalibrationFilter

    wanted = Demand(context=demand.min_ctx, tokens_per_s=demand.min_tokens_per_s, num_parallel=demand.slots)
    return workflow.tune(
        model,
        _store(query.store),
        LocalMachine(query.gpu),
        wanted,
        wanted=CalibrationFilter.of(query),
        available=query.available,
    )


def tune(
    model: str,
    *,
    min_ctx: int | None = None,
    min_tokens_per_s: float | None = None,
    slots: int = 1,
    available: Available = None,
    store: str | Path | None = None,
    **options: Any,
) -> Tuned:
    """The settings that make the most of a budget, and where none reaches it what would; measured or derived, never estimated.

    Args:
        model: as in :func:`check`.
        min_ctx: tokens per slot that have to fit; without it, as many as fit without a change.
        min_tokens_per_s: decode speed to reach; layers may then be on the host.
        slots: sequences at once.
        available: free memory instead of reading it.
        store: the folder of calibrations.
        options: ``engine``, ``variant``, ``gpu``, ``kv_cache_type`` and ``flash_attention``, as :class:`QueryOptions` has them.

    Raises:
        UnknownVerdictError: no calibration answers, or the free memory is not known. UsageError: several engines have it.
    """
    query = QueryOptions(available=read_available(available), store=None if store is None else str(store), **options)
    return tuned(model, TuneOptions(min_ctx=min_ctx, min_tokens_per_s=min_tokens_per_s, slots=slots), query)


def exported(
    name: str,
    models: Sequence[str],
    query: QueryOptions,
    *,
    style: str | None = None,
    slots: int = 1,
    folder: str = "/models",
    allowed: Allowed | None = None,
) -> Exported:
    """Settings that fit, as another program reads them: :func:`harness.serving.config_export.export`."""
    from harness.inventory.machine import LocalMachine
    from harness.serving import config_export
    from harness.serving.calibration_lookup import CalibrationFilter

    return config_export.export(
        name, models, _store(query.store), LocalMachine(query.gpu), style=style, wanted=CalibrationFilter.of(query),
        available=query.available, num_parallel=slots, folder=folder, allowed=allowed,
    )  # fmt: skip


def require_fit(model: str, ctx: int | None = None, **options: Any) -> Assessment:
    """:func:`check` for one model, as a guard: it returns what was judged, or raises.

    Raises:
        OffloadLikelyError: it would be offloaded to the CPU. UnknownVerdictError: not calibrated, or outside of the calibrated
            range. Otherwise as :func:`check`.
    """
    from harness.serving.server import require_fit as guard

    (judged,) = check(model, ctx=ctx, **options).models
    guard(judged)
    return judged


def serve(
    model: str,
    ctx: int | None = None,
    *,
    num_parallel: int = 1,
    on_offload: OnOffload = "warn",
    available: Available = None,
    measured_only: bool = False,
    port: int | None = None,
    wanted: CalibrationFilter | None = None,
    store: str | Path | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> AbstractContextManager[Server]:
    """Check a model, start it clean, hold it while the ``with`` block runs, and end it.

    Args:
        model: as in :func:`check`, or the path of a GGUF file.
        ctx: tokens per slot.
        num_parallel: slots.
        on_offload: where it would be offloaded: ``warn`` starts it anyway, ``refuse`` raises, ``shrink`` takes the largest
            context that fits, ``tune`` a smaller KV cache first (:func:`tune`).
        available: free memory instead of reading it.
        measured_only: no estimate for a model without a calibration.
        port: of 127.0.0.1; ``None``: a free one.
        wanted: which calibration is meant, where it matters.
        store: the folder of calibrations and runs.
        observer: hears the verdict, warnings and progress; ``None``: the logger ``harness``.
        options: how the engine is started, as :class:`harness.options.RunOptions` has them; what is left open is taken from the
            calibration.

    Raises:
        OffloadLikelyError, UnknownVerdictError: refused. EngineError: the engine failed. UnavailableError, NotFoundError: it,
            its model or a GPU is not there.
    """
    refuse_other_systems()
    from harness.serving import server
    from harness.serving.calibration_lookup import read_question

    question = read_question(model, ctx, num_parallel)
    return server.serve(
        question,
        RunOptions(model=question.model, num_parallel=num_parallel, **options),
        _store(store),
        on_offload=on_offload,
        wanted=wanted,
        available=read_available(available),
        measured_only=measured_only,
        port=port,
        observer=observer,
    )


def allocate(
    model: str,
    ctx: int,
    *,
    concurrency: int = 1,
    available: Available = None,
    variant: str | None = None,
    store: str | Path | None = None,
) -> Allocation:
    """The options with which vLLM starts ``model`` for ``concurrency`` sequences of ``ctx`` tokens; bytes of one GPU.

    Raises:
        UnknownVerdictError: no calibration of vLLM answers. OffloadLikelyError: it does not fit.
    """
    from harness.prediction.allocation import Deployment
    from harness.serving.allocate import answer
    from harness.serving.calibration_lookup import CalibrationFilter

    settings = CalibrationFilter(variant=variant)
    return answer(
        _store(store), model, ctx, concurrency, Deployment(), settings=settings, available=read_available(available)
    ).allocation  # fmt: skip


def parse_log(log: str | bytes | Path) -> list[LoadFacts]:
    """What an engine's log (its text, its bytes, or its path) says of each load, in its order. Never raises for what it holds.

    Raises:
        OSError: the file cannot be read.
    """
    from harness.logs import parse_log as read

    return read(log.read_bytes() if isinstance(log, Path) else log)


def _store(store: str | Path | None) -> Store:
    return Store(Path(store) if store is not None else default_root(dict(os.environ), Path.cwd()))
