"""``harness import``: a calibration from an engine's log and the memory that was measured beside it.

The log gives every part but one; the totals give that one, the overhead. A log of vLLM gives all of them on a GPU. The record
is marked (meter ``import``), so that its figures are not taken for harness's own readings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from harness import __version__
from harness.engines.base import Source
from harness.engines.policy import LoggedLoad
from harness.engines.registry import policy_of
from harness.errors import BadInputError, CannotWriteError, UntrustedError, UsageError
from harness.fit.observations import spill_reason, understood
from harness.maintain.refit import fitted
from harness.measure.calibrate import Result
from harness.measure.overwrite import refuse_overwrite
from harness.model.calibration import Calibration, artifact_name
from harness.model.facts import LoadFacts
from harness.model.record import (
    UNKNOWN_CACHE,
    EngineVersion,
    Gpu,
    Load,
    LoadRequest,
    Machine,
    Model,
    Record,
    Settings,
    Target,
)
from harness.model.trace import Plateau
from harness.store.store import Store, model_stem
from harness.text import counted
from harness.units import MIB, format_size, from_gib

#: What drivers and libraries take of one device beyond the log, bytes: an H100 took 518 to 727 MiB (docs/explanation/gpu.md),
#: cards of before about 300. It goes with the device, the type of the weights and the batch, and not with the architecture of
#: the model (on that H100 llama with 1, 8 and 32 billion parameters and qwen3moe: 697, 601, 618 and 699 MiB), so there is one
#: range. Others have less in their driver's figure; on the host it is the heap of the process.
_PLAUSIBLE: Final = {"CUDA": (150 * MIB, 1100 * MIB), "ROCm": (50 * MIB, 1500 * MIB)}
_PLAUSIBLE_GPU: Final = (0, 1024 * MIB)
_PLAUSIBLE_HOST: Final = (0, 512 * MIB)
#: Totals are often rounded to whole MiB.
_ROUNDED: Final = MIB
#: Without flash attention CUDA keeps the scores of a batch: two bytes a head, row and token, of so many heads at most.
_HEADS: Final = 128
_LOGGED: Final = "its figures are the log's, and nothing was measured beside it"
_BLOB: Final = re.compile(r"(?:^|[/\\])sha256-([0-9a-f]{64})$")


class ImportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What comes with a log: bytes of each load on its target, in the log's order, and what the log may not say.

    ``card``: the memory of each GPU, bytes.
    """

    log: str
    totals: tuple[int, ...]
    chosen: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    model: str | None = None
    gpus: tuple[str, ...] = ()
    variant: str | None = None
    force: bool = False
    card: int | None = None


def import_log(found: Sequence[LoadFacts], options: ImportOptions, store: Store) -> Result:
    """Fit the loads of a log to the totals that were given, and write the calibration.

    Raises:
        UsageError: totals and loads do not match. BadInputError: the log holds no load to fit, or contradicts what was given.
        UntrustedError: a load was not on its target, or no line can be drawn. CannotWriteError: it would overwrite another.
    """
    loads = _loads(found, options)
    target: Target = "gpu" if any(_on_gpu(facts) for facts in loads) else "host"
    name = _name(loads, options)
    record = _record(loads, options, target, name)
    calibration = fitted(record, options.log)
    _refuse_negative(calibration)
    path = store.path_of(record.engine_name, model_stem(name), options.variant)
    store.check_writable(path)
    with store.lock(path):
        if not options.force:
            refuse_overwrite(path, Source(model=record.model), calibration.metadata.settings, record.machine, store)
        folder = store.run_folder(record.run)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise CannotWriteError(f"{folder} cannot be made: {error.strerror}") from error
        written = store.write_record(record)
        store.write(path, calibration)
    return Result(artifact=path, record=written, calibration=calibration, seconds=0.0)


def _loads(found: Sequence[LoadFacts], options: ImportOptions) -> list[LoadFacts]:
    """The loads that the totals belong to."""
    numbers = options.chosen or tuple(number for number, facts in enumerate(found, 1) if facts.complete)
    if not numbers:
        why = "no load of a model" if not found else "no load that became ready"
        hint = "harness parse shows what was read of it; --load N takes one without a ready line"
        raise BadInputError(f"{options.log} holds {why}", hint=hint, code="no-load")
    if max(numbers) > len(found):
        held = counted(len(found), "load")
        raise UsageError(f"{options.log} holds {held}; there is no load {max(numbers)}", code="no-such-load")
    for what, given in (("--total", options.totals), ("--ctx", options.contexts)):
        if given and len(given) != len(numbers):
            named = ", ".join(str(number) for number in numbers)
            raise UsageError(
                f"{options.log}: {len(given)} values of {what} for {counted(len(numbers), 'load')} to import ({named})",
                hint=f"give one {what} for each in the log's order, or choose loads with --load",
                code="count-differs",
            )
    loads = [found[number - 1] for number in numbers]
    if len({facts.engine for facts in loads}) > 1:
        raise BadInputError("the loads are of different engines", hint="choose with --load", code="other-model")
    if not options.totals and policy_of(loads[0].engine).spills:
        raise UsageError(
            f"{options.log}: a load's parts do not say its overhead", hint="give a --total for each", code="no-total"
        )
    if options.card is not None and (policy_of(loads[0].engine).spills or not any(map(_on_gpu, loads))):
        raise UsageError(
            f"{options.log}: --gpu-memory is for an engine that is given a share of a GPU's memory, as vLLM",
            hint="give a --total for each load",
            code="no-share",
        )
    cards = max(len(_cards(facts)) for facts in loads)
    if options.gpus and len(options.gpus) != cards:
        raise UsageError(
            f"{options.log}: {counted(len(options.gpus), 'name')} of --gpu for loads on {counted(cards, 'GPU')}",
            hint="give one --gpu for each GPU that the log names",
            code="count-differs",
        )
    for number, facts in zip(numbers, loads, strict=True):
        _refuse(f"load {number}", facts)
    return loads


def _refuse(which: str, facts: LoadFacts) -> None:
    """Refuse what no constant can follow from. A load that was chosen, and whose memory was read, was ready."""
    if facts.failed or not (facts.complete or (understood(facts) and not facts.in_blocks)):
        raise BadInputError(f"{which} of the log did not become ready: {facts.failure or 'the log stops'}", code="no-load")
    if not policy_of(facts.engine).spills:
        return
    reason = spill_reason(facts, "gpu" if _on_gpu(facts) else "host", ready=True)
    if reason is not None:
        raise UntrustedError(f"{which} of the log cannot be used for fitting: {reason}", code="not-a-point")
    if facts.total("weights_bytes") is None:
        raise BadInputError(f"{which} of the log does not say what its weights take", code="facts-missing")
    if facts.dialect == "ollama-go" and facts.total("kv_cache_bytes") is None:
        raise BadInputError(
            f"{which} of the log does not say what its KV cache takes",
            hint="Ollama 0.6 to 0.11.4 prints it with OLLAMA_DEBUG=1",
            code="facts-missing",
        )


def _on_gpu(facts: LoadFacts) -> bool:
    whole = not policy_of(facts.engine).spills
    return any(device.kind == "gpu" and (whole or device.weights_bytes) for device in facts.devices.values())


def _cards(facts: LoadFacts) -> list[str]:
    """The GPUs that hold weights."""
    whole = facts.in_blocks
    return [name for name, device in facts.devices.items() if device.kind == "gpu" and (whole or device.weights_bytes)]


def _name(loads: Sequence[LoadFacts], options: ImportOptions) -> str:
    """What the model is called: as given, else the file that the log names."""
    paths = {facts.model for facts in loads if facts.model}
    if len(paths) > 1:
        raise BadInputError(
            f"the loads are of different models: {', '.join(sorted(paths))}", hint="choose with --load", code="other-model"
        )
    path = next(iter(paths), None)
    if options.model:
        return options.model
    if path is None or _BLOB.search(path):
        raise UsageError("the log does not name the model", hint="give its name with --model", code="no-name")
    if not policy_of(loads[0].engine).spills and not path.startswith("/"):
        return path  # of a hub, with its owner
    return re.split(r"[/\\]", path)[-1]


def _record(loads: Sequence[LoadFacts], options: ImportOptions, target: Target, name: str) -> Record:
    now, stem, first = datetime.now(UTC), artifact_name(model_stem(name)), loads[0]
    policy, totals = policy_of(first.engine), options.totals or (None,) * len(loads)
    alone = [policy.imported(facts, total, options.card) for facts, total in zip(loads, totals, strict=True)]
    _refuse_different(loads)
    blob = _BLOB.search(first.model or "")
    # One load says nothing of the contexts beyond it: constants then end where it stands.
    train = first.train_context if len({facts.context_cells for facts in loads}) > 1 else None
    started = f"{now:%Y-%m-%dT%H:%M:%SZ}"
    return Record(
        run=f"{now:%Y%m%dT%H%M%S%f}Z-import-{first.engine}-{stem}",
        harness_version=__version__,
        started_at=started,
        ended_at=started,
        seconds=0.0,
        status="complete",
        id=f"{first.engine}/{stem}",
        engine_name=first.engine,
        model=Model(
            name=name,
            digest=f"sha256:{blob[1]}" if blob else None,
            train_context=train,
            layers=None if first.layers_total is None else first.layers_total - 1,
        ),
        engine=EngineVersion(version=first.engine_version),
        settings=Settings(
            num_parallel=first.parallel or 1,
            kv_cache_type=first.kv_cache_type or UNKNOWN_CACHE,
            vllm=alone[0].settings if alone[0] else None,
        ),
        reserve_bytes=_reserve(loads),
        machine=Machine(target=target, sandbox="unknown", meter="import", gpus=tuple(Gpu(name=gpu) for gpu in options.gpus)),
        loads=tuple(
            _load(facts, index, options, target) if by_log is None else _by_log(by_log, totals[index])
            for index, (facts, by_log) in enumerate(zip(loads, alone, strict=True))
        ),
        notes=(
            f"imported from {Path(options.log).name}: "
            + (
                f"the totals ({', '.join(map(format_size, options.totals))}) were measured by others"
                if options.totals
                else _LOGGED
            ),
            *(() if train or alone[0] else (_alone(first),)),
            *(
                (*dict.fromkeys(note for one in alone if one for note in one.notes), *_unnamed(loads, options))
                if alone[0]
                else _better(loads, options)
            ),
        ),
    )


#: Settings of vLLM that one calibration has one of.
_OF_ONE_START: Final = (
    "version", "tensor_parallel", "pipeline_parallel", "max_num_seqs", "dtype", "quantization", "enforce_eager",
)  # fmt: skip


def _refuse_different(loads: Sequence[LoadFacts]) -> None:
    """Refuse loads of different versions or settings: they are no points of one line.

    Raises:
        UntrustedError: with what differs.
    """
    sides = {field.replace("_", " "): {getattr(facts.vllm, field, None) for facts in loads} for field in _OF_ONE_START}
    sides["engine version"] = {facts.engine_version for facts in loads}
    sides["KV cache type"] = {facts.kv_cache_type for facts in loads}
    for what, values in sides.items():
        if len(said := values - {None}) > 1:
            listed = ", ".join(sorted(map(str, said)))
            raise UntrustedError(
                f"the loads ran with different {what}: {listed}", hint="import those of each apart, with --load or --variant",
                code="settings-differ",
            )  # fmt: skip


def _implausible(facts: LoadFacts, overhead: int) -> str | None:
    """Why what the log does not account for cannot be the driver's part and the engine's libraries'; ``None``: it can."""
    gpus = _cards(facts)
    backends = {name.rstrip("0123456789") for name in gpus} or {"host memory"}
    ranges = [_PLAUSIBLE.get(name, _PLAUSIBLE_GPU if gpus else _PLAUSIBLE_HOST) for name in backends]
    devices = max(len(gpus), 1)
    low, high = devices * min(one[0] for one in ranges), devices * max(one[1] for one in ranges)
    if facts.flash_attention == "disabled":
        high += 2 * _HEADS * (facts.num_batch or 512) * (facts.context_cells or 0)
    if low - max(_ROUNDED, facts.uncertainty_bytes) <= overhead <= high:
        return None
    where = f"{devices} x {', '.join(sorted(backends))}" if devices > 1 else ", ".join(backends)
    return f"{format_size(low)} to {format_size(high)} are plausible on {where}"


def _reserve(loads: Sequence[LoadFacts]) -> int | None:
    """What the engine keeps free: as its log says, else by its rule for a projector."""
    said = [facts.fit.target_bytes for facts in loads if facts.fit is not None and facts.fit.target_bytes is not None]
    if said:
        return max(said)
    projector = max(facts.total("projector_bytes") or 0 for facts in loads)
    return policy_of(loads[0].engine).reserve_bytes(loads[0].engine_version, {}, projector) if projector else None


def _refuse_negative(calibration: Calibration) -> None:
    """Raise where compute buffers would be below nothing at short contexts: then the line is not the model's."""
    parts = calibration.metadata.breakdown_gb
    for band in calibration.metadata.bands:
        known = (parts.weights or 0.0) + (band.fixed_cache_gb or 0.0) + (parts.overhead or 0.0)
        compute = from_gib(band.base_vram_gb - known)
        if parts.weights is not None and compute < -_ROUNDED:
            raise UntrustedError(
                f"compute buffers come out as {format_size(compute)} without a context: they do not grow as its batch says",
                hint="import loads at two contexts or more, so that the growth is measured",
                code="negative-compute",
            )


def _better(loads: Sequence[LoadFacts], options: ImportOptions) -> Iterator[str]:
    """What the constants would need to be better."""
    contexts = len({facts.context_cells for facts in loads})
    if contexts < 3:
        more = "two loads at other contexts" if contexts < 2 else "one load at a third context"
        yield f"to be better it needs {more}: an error of its own, and the growth of the compute buffers"
    if not all(facts.complete for facts in loads):
        yield "the log has no line that says that the engine was ready: the total says so"
    if loads[0].kv_cache_type is None:
        yield "the log does not say the type of the KV cache: a question that names one is not answered"
    yield from _unnamed(loads, options)
    for number, facts in enumerate(loads):
        rest = options.totals[number] - _accounted(facts, "gpu" if _on_gpu(facts) else "host")
        if (why := _implausible(facts, rest)) is not None:
            yield f"kept by --force: {format_size(rest)} beyond the log; {why}"


def _unnamed(loads: Sequence[LoadFacts], options: ImportOptions) -> Iterator[str]:
    if not options.gpus and any(map(_on_gpu, loads)):
        yield "the GPU is not named: with --gpu NAME it answers for that GPU alone"


def _by_log(logged: LoggedLoad, total: int | None) -> Load:
    """One load as its log has it, with the figure of others where there is one."""
    plateau = None if total is None else Plateau(total_bytes=total, readings=1)
    return Load(
        request=logged.request,
        outcome="ok",
        facts=logged.facts,
        idle=plateau,
        busy=plateau,
        ready=logged.facts.load_seconds,
    )


def _alone(facts: LoadFacts) -> str:
    growth = " and compute grows by the known law, which was not measured here" if facts.flash_attention == "enabled" else ""
    return f"one load: the constants end at its context{growth}"


def _accounted(facts: LoadFacts, target: Target) -> int:
    """What a log says of the target, all parts together; of host memory that is everything, bytes."""
    parts = ("weights", "lora", "projector", "compute", "output", "kv_cache", "recurrent")
    return sum(facts.total(f"{part}_bytes", "gpu" if target == "gpu" else None) or 0 for part in parts)


def _load(facts: LoadFacts, index: int, options: ImportOptions, target: Target) -> Load:
    """One load as if it had been measured, with the figure of others for its plateau."""
    asked = options.contexts[index] if options.contexts else None
    parallel = facts.parallel or 1
    logged = None if facts.context_cells is None else facts.context_cells // parallel
    if asked is not None and logged is not None and not 0 <= logged - asked < 256:
        raise BadInputError(f"--ctx says {asked:,}, and the log {logged:,} tokens a slot", code="context-differs")
    if logged == 0:
        raise BadInputError(f"the log says {facts.context_cells:,} cells for {parallel} slots", code="facts-missing")
    if logged is None and asked is None:
        raise UsageError("the log does not say the context", hint="give it with --ctx", code="no-context")
    total = options.totals[index]
    accounted = _accounted(facts, target)
    if total + max(facts.uncertainty_bytes, _ROUNDED) < accounted:
        raise BadInputError(
            f"--total {format_size(total)} is less than the {format_size(accounted)} that the log itself accounts for",
            hint="a total is what all processes of the engine hold on the device; a bare number is MiB, else 4.5GiB or 4.8GB",
            code="total-too-small",
        )
    if not options.force and (why := _implausible(facts, total - accounted)) is not None:
        raise UntrustedError(
            f"--total {format_size(total)} is {format_size(total - accounted)} more than the log accounts for; {why}",
            hint="look for other processes on the device, and at the unit of the total; --force keeps it with a note",
            code="implausible-overhead",
        )
    plateau = Plateau(total_bytes=total, readings=1)
    return Load(
        request=LoadRequest(context=asked or logged or 0, num_batch=facts.num_batch),
        outcome="ok",
        facts=facts
        if facts.context_cells is not None
        else msgspec.structs.replace(facts, context_cells=(asked or 0) * parallel),
        idle=plateau,
        busy=plateau,
        ready=facts.load_seconds,
    )
