"""Models without a calibration: what their header says, by the engine's own plan of a load, else by arithmetic.

A header is read where it costs no more than a file: a ``.gguf`` of this machine, one of the catalog that is here, or an address
that the user has written. A plain name is looked up nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.base import Options
from harness.engines.gguf import Header, describe, read_header, server_estimate, tensor_bytes
from harness.engines.registry import EMBEDDED, policy_of, version_here
from harness.engines.settings import asked_flash
from harness.engines.shape import shape_of
from harness.errors import BadInputError, HarnessError, UntrustedError
from harness.headers.sources import Found, find, is_remote, open_client
from harness.inventory.machine import LocalMachine
from harness.inventory.weights import names_file
from harness.model.calibration import Calibration, artifact_name
from harness.model.gpu import LocalGpu
from harness.model.planned import Method
from harness.model.record import Load, LoadRequest, Record, Settings, Target
from harness.prediction.estimate import (
    DEFAULT_OVERHEAD,
    EstimatedModel,
    Overhead,
    Planned,
    estimated,
    planned_load,
    record_of,
)
from harness.prediction.formula import plan_by_formula
from harness.serving.advice import calibrating
from harness.serving.calibration_lookup import CalibrationFilter, CalibrationMatch, CheckRequest
from harness.store.store import Store, from_home
from harness.units import MIB, from_gib

#: Doubt of the driver's part that another calibration of the device says, bytes: it goes with the batch and the engine, on the
#: host with the tokenizer.
_KNOWN_DOUBT: Final = {"gpu": 96 * MIB, "host": 80 * MIB}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model would run: a card that was described, the GPUs of this machine, or its memory."""

    target: Target
    available: tuple[int, ...] | None
    gpus: tuple[LocalGpu, ...] = ()


class Readable(msgspec.Struct, frozen=True, kw_only=True):
    """A header that was read: ``path`` is a file that an engine can read it from, ``None`` where there is none."""

    name: str
    header: Header
    path: Path | None
    key: str
    size: int
    digest: str | None = None


def place_of(machine: LocalMachine, available: tuple[int, ...] | None) -> Place:
    """Memory that was given is a card's, or the chosen GPU's; else NVIDIA's GPUs, those the engine lists, or host memory."""
    machine.check_sizes(available)
    if available is not None and not machine.names_gpu:
        return Place(target="gpu", available=available)
    gpus = machine.nvidia
    if isinstance(gpus, HarnessError) and not machine.names_gpu:
        gpus = machine.engine_gpus({})
    if isinstance(gpus, HarnessError):
        if machine.names_gpu:
            raise gpus
        return Place(target="host", available=None if machine.host_bytes is None else (machine.host_bytes,))
    own = tuple(gpu for gpu in gpus if not gpu.shared) or gpus
    free = tuple(gpu.free_bytes for gpu in own)
    return Place(target="gpu", gpus=own, available=available or (None if None in free else tuple(one or 0 for one in free)))


def readable(name: str) -> bool:
    """Whether a name is one whose header can be read without asking a registry; nothing is opened."""
    return is_remote(name) or (names_file(name) and from_home(name).is_file())


@contextmanager
def opened(name: str, found: Found | None = None) -> Iterator[Readable]:
    """The header of a file, or of an address, and a file for an engine to plan with.

    Raises:
        HarnessError: it cannot be read.
    """
    if found is None and not is_remote(name):
        path = Path(name).expanduser().resolve()
        with open_client() as client:
            parts = find(str(path), client).parts
        headers = [read_header(one.path) for one in parts if one.path is not None]
        whole = msgspec.structs.replace(headers[0], tensors=tuple(one for header in headers for one in header.tensors))
        state = path.stat()
        key = f"{path}:{state.st_size}:{state.st_mtime_ns}:{state.st_ino}"
        yield Readable(name=path.name, header=whole, path=path, key=key, size=sum(one.size or 0 for one in parts))
        return
    from harness.headers.read import header_only

    with open_client() as client:
        found = found or find(name, client)
        with header_only(found, client) as here:
            with here.parts[0].open("rb") as file:
                begin = file.read(here.header.begin)
            size = sum(path.stat().st_size for path in here.parts)
            yield Readable(
                name=here.name, header=here.header, path=here.parts[0], size=size, digest=here.digest,
                key=f"{hashlib.sha256(begin).hexdigest()}:{size}",
            )  # fmt: skip


def estimate(
    question: CheckRequest, store: Store, machine: LocalMachine, wanted: CalibrationFilter, available: tuple[int, ...] | None
) -> CalibrationMatch | None:
    """What stands in for a calibration of a model that has none; ``None`` without a header, or for several devices.

    Raises:
        HarnessError: the header was to be read, and cannot be.
    """
    if not readable(question.model) or question.digest is not None or wanted.variant is not None:
        return None
    if not policy_of(wanted.engine or EMBEDDED).ggml_caches:
        return None
    place = place_of(machine, available)
    if len(place.available or ()) > 1 or len(place.gpus) > 1:
        return None  # what each of several devices takes is not in a header
    with opened(question.model) as here:
        try:
            return estimate_of(here, question, store, place, wanted)
        except UntrustedError:
            return None


def estimate_of(
    here: Readable,
    question: CheckRequest,
    store: Store,
    place: Place,
    wanted: CalibrationFilter,
    *,
    weights_bytes: int | None = None,
    input_share: float = 1.0,
) -> CalibrationMatch:
    """The same of a header that was read.

    ``weights_bytes`` are those of another quantisation of the model; ``input_share`` of its input embeddings, by the share that
    they have in this one, are then taken to stay on the host.

    Raises:
        UntrustedError: nothing can be said: the header does not say what decides its memory, or it grows by no line.
    """
    shape = shape_of(here.header)
    if shape is None:
        raise UntrustedError(f"the header of {here.name} does not say how its layers attend", code="no-shape")
    if weights_bytes is not None:
        inputs = round(input_share * shape.input_bytes * weights_bytes / max(shape.weights_bytes, 1))
        shape = msgspec.structs.replace(shape, weights_bytes=weights_bytes, input_bytes=inputs)
    engine = wanted.engine or EMBEDDED
    policy_of(engine).check_slots(question.num_parallel)
    subject = EstimatedModel(
        model=describe(here.header, here.name, here.digest), shape=shape, tensors=tensor_bytes(here.header),
        estimate=server_estimate(here.header, here.size),
    )  # fmt: skip
    overhead = overhead_of(engine, place, store)
    calibration, method = _fitted(here, subject, question, engine, place.target, wanted, overhead)
    notes = (
        f"not measured: {METHODS[method]}; what {_WHAT[place.target]} takes beyond that is {overhead.origin}",
        f"measure it without its weights: {calibrating(question.model, wanted, store)} --header-only",
    )
    return CalibrationMatch(
        calibration=calibration,
        path=Path(f"{artifact_name(here.name.removesuffix('.gguf'))}.yaml"),
        gpus=place.gpus,
        available=place.available,
        warnings=notes,
        identity="digest",
        method=method,
    )


#: How an estimate was made, for people.
METHODS: Final[dict[Method, str]] = {
    "dry run": "llama.cpp's own plan of the load, from the header",
    "formula": "arithmetic from the header, because no engine here can plan the load",
}
_WHAT: Final = {"gpu": "the driver", "host": "the process"}


def _fitted(
    here: Readable, subject: EstimatedModel, question: CheckRequest, engine: str, target: Target, wanted: CalibrationFilter,
    overhead: Overhead,
) -> tuple[Calibration, Method]:  # fmt: skip
    methods: tuple[Method, ...] = ("dry run", "formula") if here.path is not None else ("formula",)
    failure: UntrustedError | None = None
    for method in methods:
        try:
            found = _by(method, here, subject, question, engine, target, wanted, overhead)
        except UntrustedError as error:
            failure = error
            continue
        if found is not None:
            return found, method
    raise failure or UntrustedError(f"the memory of {here.name} cannot be estimated", code="no-estimate")


def _by(
    method: Method, here: Readable, subject: EstimatedModel, question: CheckRequest, engine: str, target: Target,
    wanted: CalibrationFilter, overhead: Overhead,
) -> Calibration | None:  # fmt: skip
    policy, slots, train = policy_of(engine), question.num_parallel, subject.shape.train_context
    options = Options(
        engine=engine, num_parallel=slots, kv_cache_type=wanted.kv_cache_type, target=target,
        flash_attention=asked_flash(wanted.flash_attention),
    )  # fmt: skip
    limits = policy.batch_limits(None, target=target, flash_attention=options.flash_attention)
    contexts = sorted({max(train // part // 256 * 256, min(256, train)) for part in (8, 2, 1)})
    requests = policy.plan(contexts, train, num_batch=wanted.num_batch, batch_limits=limits, num_parallel=slots)
    kind = wanted.kv_cache_type or policy.default_cache_type
    settings = Settings(
        num_parallel=slots, num_batch=wanted.num_batch, kv_cache_type=kind, flash_attention=wanted.flash_attention
    )  # fmt: skip
    from harness.headers.planning import Planner

    planner = Planner(here.path, here.key, options) if here.path is not None and method == "dry run" else None
    if planner is not None and not planner.prepare(requests):
        if planner.refused:
            raise BadInputError(
                f"llama.cpp {version_here(EMBEDDED, 'process')} does not load {here.name}: {planner.refused}",
                hint="calibrate it with an engine that loads it",
                code="not-loadable",
            )
        return None

    def load(one: LoadRequest) -> Load | None:
        if planner is not None:
            found = planner.plan(one)
        else:
            found = plan_by_formula(subject.shape, one.context, one.num_batch or 512, slots, kind, wanted.flash_attention)
        return None if found is None else planned_load(Planned(request=one, load=found), subject, engine, target, slots)

    loads: list[Load] = []

    def record() -> Record:
        return record_of(
            subject, loads, name=artifact_name(here.name.removesuffix(".gguf")), engine=engine, target=target,
            version=version_here(engine, "process"), settings=settings, reserve=policy.reserve_bytes(None, {}),
            batch_limits=limits,
        )  # fmt: skip

    order = policy.order(requests, record, lambda _: None)
    following = next(order, None)
    while following is not None:
        made = load(following.request)
        if made is None:
            return None
        loads.append(made)
        try:
            following = order.send(made)
        except StopIteration:
            break
    return estimated(record(), subject.shape, overhead, method, min(question.context, train))


def overhead_of(engine: str, place: Place, store: Store) -> Overhead:
    """The driver's part on a device: of calibrations of it, of ``doctor --measure-overhead``, else a default."""
    names = {gpu.name for gpu in place.gpus}
    found: list[float] = []
    for entry in store.entries(lambda _: None):
        metadata = entry.calibration.metadata
        same = metadata.machine.target == place.target and (
            place.target == "host" or (bool(names) and {gpu.name for gpu in metadata.machine.gpus} == names)
        )
        if same and entry.calibration.engine == engine and metadata.breakdown_gb.overhead is not None:
            found += [metadata.breakdown_gb.overhead, *(band.overhead_gb or 0.0 for band in metadata.bands)]
    if found:
        device = "host memory" if place.target == "host" else " + ".join(sorted(names))
        origin = f"that of other calibrations of {device}"
        # On the host it is the heap of a tokenizer above all: one small model does not speak for a large vocabulary.
        least = DEFAULT_OVERHEAD["host"].size if place.target == "host" else 0
        return Overhead(size=max(from_gib(max(found)), least), doubt=_KNOWN_DOUBT[place.target], origin=origin)
    if len(names) == 1:
        from harness.serving.driver_overhead import known_overheads

        known = known_overheads(store).get(next(iter(names)))
        if known is not None:
            return Overhead(size=from_gib(known.overhead_gb), doubt=_KNOWN_DOUBT["gpu"], origin=f"measured with {known.engine}")
    return DEFAULT_OVERHEAD[place.target]
