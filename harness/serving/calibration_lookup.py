"""Which of a model's calibrations holds here, and what is free for it now."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from harness.engines.registry import BUILT_IN, policy_of
from harness.engines.settings import recorded_flash, settings_alone
from harness.errors import ADVICE, HarnessError, UsageError
from harness.inventory.machine import LocalMachine
from harness.inventory.weights import Identity, identify, of_its_weights
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.model.gpu import LocalGpu
from harness.model.planned import Method
from harness.options import QueryOptions
from harness.prediction.forced import NOTHING, Forced
from harness.prediction.rules import LoadedModel, Rules
from harness.prediction.settings import AskedSettings, derive
from harness.prediction.verdict import named
from harness.store.store import Store, key_of, variant_of
from harness.units import MAX_CONTEXT, split_context

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{6,64}")


class CheckRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context, in tokens per slot; ``digest`` (or its beginning) names the weights that are meant."""

    model: str
    context: int
    num_parallel: int = 1
    digest: str | None = None


class CalibrationFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which of a model's calibrations: ``variant`` decides alone; settings count where they are given.

    ``forced`` is a placement that was asked for, ``host_available`` host memory beside a card that is not here, bytes.
    ``surroundings``: what is set here and not said by an option counts as asked for, since it is what a start would take.
    """

    engine: EngineName | None = None
    variant: str | None = None
    kv_cache_type: str | None = None
    flash_attention: Literal["enabled", "disabled"] | None = None
    num_batch: int | None = None
    forced: Forced = NOTHING
    host_available: int | None = None
    surroundings: bool = False

    @property
    def asked(self) -> AskedSettings:
        """The settings among them."""
        return AskedSettings(kv_cache_type=self.kv_cache_type, flash_attention=self.flash_attention, num_batch=self.num_batch)

    @classmethod
    def of(cls, query: QueryOptions, *, surroundings: bool = False) -> CalibrationFilter:
        """Of the options of a question."""
        return cls(
            engine=None if query.engine == "auto" else query.engine,
            variant=query.variant,
            kv_cache_type=query.kv_cache_type,
            flash_attention=recorded_flash(query.flash_attention),
            num_batch=query.num_batch,
            forced=Forced(gpu_layers=query.gpu_layers, cpu_moe=query.n_cpu_moe, fit=query.fit == "on", reserve=query.reserve),
            host_available=query.host_available,
            surroundings=surroundings,
        )


class CalibrationMatch(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration and what it holds for: ``gpus`` are those of this machine, empty for host memory or where none was read.

    ``obstacle`` says why nothing could be read, ``advice`` what to do then. ``derived`` says which figures were calculated for
    other settings than were measured, ``identity`` how the weights were identified, ``method`` how the figures were estimated
    (``None``: measured).
    """

    calibration: Calibration
    path: Path
    gpus: tuple[LocalGpu, ...] = ()
    available: tuple[int, ...] | None = None
    obstacle: str | None = None
    advice: str = ADVICE
    warnings: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    identity: Identity | str = "name"
    method: Method | None = None

    @property
    def names(self) -> tuple[str, ...] | None:
        """Short names of the GPUs, which differ from each other; ``None`` where they are not of this machine."""
        return tuple(f"GPU{gpu.key}" if gpu.key.isdecimal() else gpu.key for gpu in self.gpus) or None

    def loaded(self, machine: LocalMachine | None) -> tuple[tuple[Rules, LoadedModel], ...]:
        """What servers of its engine hold of its GPUs now, as the engine goes by it; nothing of a card that is not here."""
        if machine is None or not self.gpus or self.available is None:
            return ()
        rules = policy_of(self.calibration.engine)
        held = machine.loaded(self.calibration.engine, self.gpus, named(self.available, self.names))
        return tuple((rules, one) for one in held)

    @property
    def variant(self) -> str | None:
        """The variant's name; ``None`` for the default file."""
        return variant_of(self.path)


def read_question(spec: str, context: int | None, num_parallel: int = 1) -> CheckRequest:
    """``MODEL[@VARIANT]``, with ``@CTX`` or ``@sha256:…`` behind it, and ``context`` where the spec names none.

    Raises:
        UsageError: no context, one that is no context, or no model.
    """
    name, digest, named = spec, None, False
    while "@" in name:
        head, _, tail = name.rpartition("@")
        try:
            _, given = split_context(name)
        except ValueError as error:
            raise UsageError(f"{spec}: {error}", code="bad-context") from error
        if given is not None:
            if named:
                raise UsageError(f"{spec} names two contexts", hint="one @CTX for each model", code="bad-context")
            context, named = given, True
        elif tail.startswith("sha256:"):
            if not _DIGEST.fullmatch(tail):
                raise UsageError(f"{spec}: a digest is sha256: and 6 to 64 hexadecimal digits")
            digest = tail
        else:
            break
        name = head
    if not name or any(not character.isprintable() for character in name):
        raise UsageError(f"{spec!r} names no model", code="bad-name")
    if context is None:
        raise UsageError(f"missing context for {name}", hint=f"{name.rstrip('@')}@8192, or --ctx 8192", code="no-context")
    if not 1 <= context <= MAX_CONTEXT:
        raise UsageError(f"{spec}: a context is 1 to {MAX_CONTEXT:,} tokens", code="bad-context")
    return CheckRequest(model=name, context=context, num_parallel=num_parallel, digest=digest)


def choose(
    question: CheckRequest,
    store: Store,
    machine: LocalMachine,
    wanted: CalibrationFilter,
    available: tuple[int, ...] | None = None,
) -> CalibrationMatch | str:
    """The calibration that holds here with what is free for it, or why there is none.

    Raises:
        UsageError: several engines have the model. BadInputError, ConfigError: a file that cannot be read.
    """
    machine.check_sizes(available)
    found = pick(question, store, machine, wanted, available)
    if isinstance(found, str):
        return found
    path, calibration = found
    policy_of(calibration.engine).check_slots(question.num_parallel)
    identity = identify(question.model, calibration)
    if identity not in get_args(Identity):
        return identity
    asked = msgspec.structs.replace(wanted.asked, num_parallel=question.num_parallel, placed=wanted.forced != NOTHING)
    set_here = wanted.surroundings and available is None and wanted.variant is None
    if set_here or machine.start_env is not None:
        from harness.serving.surroundings import as_set_here, settings_here

        asked, others = settings_here(calibration, asked, machine)
        calibration = as_set_here(calibration, machine)
        if others:
            return f"{path.stem} was not calibrated with {' and '.join(others)}: its figures do not hold"
    at = derive(calibration, asked, ggml_caches=policy_of(calibration.engine).ggml_caches)
    if at.obstacles:
        return differs(path.stem, at.obstacles)
    chosen = _here(path, at.calibration, machine, as_given(calibration, available, wanted.host_available))
    calibration, note = chosen.calibration, None
    if len(chosen.gpus) == 1:
        from harness.serving.driver_overhead import on_this_gpu

        calibration, note = on_this_gpu(chosen.calibration, chosen.gpus[0].name, store)
    notes = (*(f"derived: {one}" for one in at.derived), *chosen.warnings, *((note,) if note else ()))
    return msgspec.structs.replace(
        chosen,
        calibration=calibration,
        warnings=notes,
        derived=at.derived,
        identity=identity,
    )


def is_derived(calibration: Calibration, num_parallel: int) -> bool:
    """Whether what so many slots take was calculated from what another number took."""
    return num_parallel != calibration.metadata.settings.num_parallel and policy_of(calibration.engine).spills


def differs(name: str, obstacles: Sequence[str]) -> str:
    """Why a calibration does not answer for the settings of a question."""
    return f"{name} was calibrated with {' and '.join(obstacles)}: its figures do not hold"


def _by_other_names(model: str, store: Store, engine: str | None) -> list[tuple[Path, Calibration]]:
    """Calibrations under another name that an engine has for the same model."""
    head = model.partition("/")[0]
    for one in (engine,) if engine else (head,) if head in BUILT_IN else BUILT_IN:
        for other in policy_of(one).other_names(model):
            if found := store.find(other, one):
                return found
    return []


def pick(
    question: CheckRequest,
    store: Store,
    machine: LocalMachine,
    wanted: CalibrationFilter,
    available: tuple[int, ...] | None = None,
) -> tuple[Path, Calibration] | str:
    """The variant asked for, else one of the same GPU and settings, else the default file; or why there is none."""
    found = store.find(question.model, wanted.engine) or _by_other_names(question.model, store, wanted.engine)
    if not found:
        of_its_weights(question.model, found)  # a path to no file is said as such
        return store.missing(question.model)
    if question.digest is not None:
        found = [one for one in found if (one[1].metadata.model.digest or "").startswith(question.digest)]
        if not found:
            return f"{question.model} was calibrated with other weights than {question.digest}"
    if wanted.variant is not None:
        found = [one for one in found if variant_of(one[0]) == wanted.variant]
        if not found:
            return f"{question.model} has no variant {wanted.variant!r}"
    same_weights = of_its_weights(question.model, found)
    if isinstance(same_weights, str):
        return same_weights
    found = same_weights
    if wanted.variant is not None:
        return found[0]
    if store.names_variant(question.model, found):
        return found[0]
    plain = [one for one in found if variant_of(one[0]) is None]
    if plain == found:
        return plain[0]  # one file is all there is: nothing needs to be read to choose it
    same = [one for one in found if _same(one[1], machine, wanted, available)]
    usable = [one for one in same if one in plain] or same or plain
    if usable:
        return usable[0]
    names = ", ".join(variant_of(path) or "" for path, _ in found)
    return f"{question.model} has only variants, for other GPUs or settings: {names}; choose one with --variant"


def is_exact(calibration: Calibration, wanted: CalibrationFilter) -> bool:
    """Whether it was made with the settings that are asked for."""
    at = derive(calibration, wanted.asked)
    return not at.obstacles and not at.derived


def _same(
    calibration: Calibration, machine: LocalMachine, wanted: CalibrationFilter, available: tuple[int, ...] | None
) -> bool:
    if not is_exact(calibration, wanted):
        return False
    if available is not None and not machine.names_gpu:
        return True  # a card that is not here
    if calibration.metadata.machine.target == "host":
        return not machine.names_gpu and isinstance(machine.nvidia, HarnessError)
    present = _present(calibration, machine)
    return not isinstance(present, HarnessError) and _matching(calibration, present) is not None


def _present(calibration: Calibration, machine: LocalMachine) -> tuple[LocalGpu, ...] | HarnessError:
    """GPUs of the kind that a calibration was made on."""
    metadata = calibration.metadata
    return machine.gpus_of(metadata.machine.meter, settings_alone(metadata.settings.env))


def _matching(calibration: Calibration, present: tuple[LocalGpu, ...]) -> tuple[LocalGpu, ...] | None:
    """The GPUs here that are those of a calibration: by UUID, else by name, the emptiest first; ``None``: they are not here."""
    left, chosen = list(present), []
    for gpu in calibration.metadata.machine.gpus:
        same = [one for one in left if one.name == gpu.name]
        if not same:
            return None
        best = next((one for one in same if gpu.uuid and one.uuid == gpu.uuid), max(same, key=_room))
        left.remove(best)
        chosen.append(best)
    return tuple(chosen) or None


def _used(calibration: Calibration, present: tuple[LocalGpu, ...]) -> tuple[LocalGpu, ...]:
    """The GPUs from which an engine chooses: all, integrated ones only where there is no other.

    Of the instances of split GPUs a process sees one alone, the first (CUDA enumerates a single compute instance). An engine
    that spreads nothing by itself gets those that it was calibrated on, or the emptiest.
    """
    present = tuple(gpu for gpu in present if not gpu.mig) or present[:1]
    if not policy_of(calibration.engine).spills:
        return _matching(calibration, present) or (max(present, key=_room),)
    return tuple(gpu for gpu in present if not gpu.shared) or present


def _room(gpu: LocalGpu) -> int:
    return gpu.free_bytes or 0


def _here(path: Path, calibration: Calibration, machine: LocalMachine, available: tuple[int, ...] | None) -> CalibrationMatch:
    """What is free for a calibration, and what differs from where it was made.

    ``available`` is of a card that is not here, or of the GPU that ``machine`` was asked for.
    """
    other: list[str] = []
    newer = []
    version = machine.engine_version(calibration)
    if version is not None and version != calibration.metadata.engine.version:
        newer.append(f"{calibration.engine} {calibration.metadata.engine.version}, here it is {version}")
    gpus: tuple[LocalGpu, ...] = ()
    obstacle, notes = None, []
    on_host = calibration.metadata.machine.target == "host"
    if on_host and machine.names_gpu:
        available, obstacle = None, f"it was calibrated in host memory, not on GPU {machine.gpu}"
    elif on_host and available is None:
        available = None if machine.host_bytes is None else (machine.host_bytes,)
    elif available is None or machine.names_gpu:
        present = _present(calibration, machine)
        if isinstance(present, HarnessError):
            available, obstacle = None, present.message
        else:
            gpus = _used(calibration, present)
            strange = {gpu.name for gpu in gpus} - {gpu.name for gpu in calibration.metadata.machine.gpus}
            if strange and calibration.metadata.machine.gpus:
                other.append(f"{calibration.metadata.machine.devices()}, here it is {' + '.join(gpu.name for gpu in gpus)}")
            drivers = {one.driver for one in gpus} - {None}
            newer += [
                f"driver {one.driver}, here it is {', '.join(sorted(map(str, drivers)))}"
                for one in calibration.metadata.machine.gpus[:1]
                if one.driver and drivers and one.driver not in drivers
            ]
            free = tuple(one.free_bytes for one in gpus)
            available = available or (None if None in free else free)  # type: ignore[assignment]
            if available is None:
                obstacle = next((one.why for one in gpus if one.why), "the driver does not say how much is free")
    name = shlex.quote(key_of(calibration, path))
    if other:
        model = shlex.quote(calibration.metadata.model.name)
        notes.append(f"calibrated with {'; '.join((*other, *newer))}: harness calibrate {model} --variant NAME")
    elif newer:
        program = (
            " --engine-binary PATH" if calibration.metadata.engine.named and calibration.metadata.engine.image is None else ""
        )
        notes.append(f"calibrated with {'; '.join(newer)}: harness recalibrate {name}{program}")
    return CalibrationMatch(
        calibration=calibration, path=path, gpus=gpus, available=available, obstacle=obstacle, warnings=tuple(notes),
        advice=ADVICE if not machine.names_gpu or gpus else "leave --gpu out, or name a GPU that is here",
    )  # fmt: skip


def as_given(calibration: Calibration, available: tuple[int, ...] | None, host: int | None) -> tuple[int, ...] | None:
    """What is free for a model, of what was given: in host memory no more than the host's; ``None``: it is to be read."""
    if host is None or calibration.metadata.machine.target != "host" or len(available or ()) > 1:
        return available
    return (min(host, *(available or ())),) if available else (host,)
