"""The question before a start: the calibration of a model that holds on this machine, what is free now, and the verdict."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.core.calibration import Calibration
from harness.core.facts import EngineName
from harness.core.verdict import Fate, Verdict, judge, judge_together
from harness.errors import HarnessError, UsageError
from harness.store import Store
from harness.workflows.machine import ADVICE, GpuNow, MachineNow, residents

Word = Literal["fits", "offload", "unknown"]
_CONTEXT: Final = re.compile(r"[+-]?\d+", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{6,64}")
_MOST: Final = 1 << 31


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context, in tokens per slot; ``digest`` (or its beginning) names the weights that are meant."""

    model: str
    context: int
    num_parallel: int = 1
    digest: str | None = None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which of a model's calibrations: ``variant`` decides alone; settings count where they are given."""

    engine: EngineName | None = None
    variant: str | None = None
    kv_cache_type: str | None = None
    flash_attention: Literal["enabled", "disabled"] | None = None


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration and what it holds for: ``gpus`` are those of this machine, empty for host memory or where none was read.

    ``obstacle`` says why nothing could be read.
    """

    calibration: Calibration
    path: Path
    gpus: tuple[GpuNow, ...] = ()
    available: tuple[int, ...] | None = None
    obstacle: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def variant(self) -> str | None:
        """The variant's name; ``None`` for the default file."""
        return self.path.stem.partition("@")[2] or None


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of one model. ``verdict`` is ``None`` where it has no calibration; ``advice`` is what to do then.

    ``fate`` is set where several models are judged: ``resident``, ``offload``, ``evicted``. ``full_decode_tokens_per_s`` is
    the speed with everything on the target.
    """

    question: Question
    word: Word
    chosen: Chosen | None = None
    verdict: Verdict | None = None
    fate: Fate | None = None
    reason: str | None = None
    advice: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def full_decode_tokens_per_s(self) -> float | None:
        """Decode speed with everything on the target."""
        return None if self.chosen is None else self.chosen.calibration.metadata.performance.decode_tokens_per_s

    def to_json(self) -> dict[str, object]:
        """One entry of ``check --json``'s ``models[]``."""
        document: dict[str, object] = {
            "model": self.question.model,
            "id": None if self.chosen is None else self.chosen.calibration.id,
            "variant": None if self.chosen is None else self.chosen.variant,
            "context": self.question.context,
            "num_parallel": self.question.num_parallel,
            "fate": self.fate,
            "verdict": self.word,
        }
        for field in FIELDS:
            document[field] = None if self.verdict is None else getattr(self.verdict, field)
        return {**document, "reason": self.reason, "advice": self.advice, "warnings": list(self.warnings)}


#: Fields of a verdict in ``check --json``.
FIELDS: Final = (
    *("basis", "required_bytes", "reserve_bytes", "available_bytes", "short_bytes", "max_context", "layers_total"),
    *("layers_offloaded", "layers_overflowing", "decode_tokens_per_s"),
)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of :func:`check`: the worst word over all models, and what is said of each of them."""

    verdict: Word
    models: tuple[Judged, ...]

    @property
    def fits(self) -> bool:
        """Whether everything stays on its target."""
        return self.verdict == "fits"

    def to_json(self) -> dict[str, object]:
        """The object of ``check --json``: the fields of one model above; with several they stand in ``models[]`` alone."""
        models = [one.to_json() for one in self.models]
        above = {field: models[0][field] if len(models) == 1 else None for field in FIELDS}
        return {"verdict": self.verdict, **above, "models": models}


def read_question(spec: str, context: int | None, num_parallel: int = 1) -> Question:
    """``MODEL``, ``MODEL@CTX`` or ``MODEL@sha256:…``, with ``context`` where the spec names none.

    Raises:
        UsageError: no context, one that is no context, or no model.
    """
    name, digest = spec, None
    while "@" in name:
        head, _, tail = name.rpartition("@")
        if _CONTEXT.fullmatch(tail):
            context = int(tail) if len(tail) < 12 else _MOST + 1
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
        raise UsageError(f"at which context? {name} needs one", hint=f"{name}@8192, or --ctx 8192", code="no-context")
    if not 1 <= context <= _MOST:
        raise UsageError(f"{spec}: a context is 1 to {_MOST} tokens", code="bad-context")
    return Question(model=name, context=context, num_parallel=num_parallel, digest=digest)


def choose(
    question: Question, store: Store, machine: MachineNow, wanted: Wanted, available: tuple[int, ...] | None = None
) -> Chosen | str:
    """The calibration that holds machine, or why there is none.

    It is the variant asked for, else one of the same GPU and settings, else the default file with a warning of what differs.

    Raises:
        UsageError: several engines have the model. BadInputError, ConfigError: a file that cannot be read.
    """
    found = store.find(question.model, wanted.engine)
    if not found:
        return f"{question.model} has no calibration in {store.root}"
    if question.digest is not None:
        found = [one for one in found if (one[1].metadata.model.digest or "").startswith(question.digest)]
        if not found:
            return f"{question.model} was calibrated with other weights than {question.digest}"
    if wanted.variant is not None:
        found = [one for one in found if one[0].stem.endswith(f"@{wanted.variant}")]
        return _here(*found[0], machine, wanted, available) if found else f"{question.model} has no variant {wanted.variant!r}"
    # Where one file is all there is, nothing needs to be read to choose it.
    same = [one for one in found if len(found) == 1 or _same(one[1], machine, wanted, available)]
    plain = [one for one in found if "@" not in one[0].stem]
    usable = [one for one in same if one in plain] or (same if len(found) > 1 else []) or plain
    if not usable:
        names = ", ".join(path.stem.partition("@")[2] for path, _ in found)
        return f"{question.model} has only variants, for other GPUs or settings: {names}; choose one with --variant"
    return _here(*usable[0], machine, wanted, available)


def _same(calibration: Calibration, machine: MachineNow, wanted: Wanted, available: tuple[int, ...] | None) -> bool:
    if _other_settings(calibration, wanted):
        return False
    if available is not None:
        return True  # a card that is not here
    if calibration.metadata.machine.target == "host":
        return isinstance(machine.nvidia, HarnessError)
    present = _present(calibration, machine)
    return not isinstance(present, HarnessError) and _matching(calibration, present) is not None


def _present(calibration: Calibration, machine: MachineNow) -> tuple[GpuNow, ...] | HarnessError:
    """GPUs of the kind that a calibration was made on."""
    if calibration.metadata.machine.meter == "log":
        return machine.engine_gpus(calibration.metadata.settings.env)
    return machine.nvidia


def _matching(calibration: Calibration, present: tuple[GpuNow, ...]) -> tuple[GpuNow, ...] | None:
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


def _room(gpu: GpuNow) -> int:
    return gpu.free_bytes or 0


def _other_settings(calibration: Calibration, wanted: Wanted) -> list[str]:
    settings = calibration.metadata.settings
    differs = []
    if wanted.kv_cache_type not in (None, settings.kv_cache_type):
        differs.append(f"KV cache {settings.kv_cache_type}, not {wanted.kv_cache_type}")
    if wanted.flash_attention not in (None, settings.flash_attention):
        differs.append(f"flash attention {settings.flash_attention}, not {wanted.flash_attention}")
    return differs


def _here(
    path: Path, calibration: Calibration, machine: MachineNow, wanted: Wanted, available: tuple[int, ...] | None
) -> Chosen:
    """What is free for a calibration, and what differs from where it was made."""
    other = [*_other_settings(calibration, wanted)]
    newer = []
    version = machine.engine_version(calibration)
    if version is not None and version != calibration.metadata.engine.version:
        newer.append(f"{calibration.engine} {calibration.metadata.engine.version}, here it is {version}")
    gpus: tuple[GpuNow, ...] = ()
    obstacle, notes = None, []
    if available is None and calibration.metadata.machine.target == "host":
        available = None if machine.host_bytes is None else (machine.host_bytes,)
    elif available is None:
        present = _present(calibration, machine)
        if isinstance(present, HarnessError):
            obstacle = present.message
        else:
            matching = _matching(calibration, present)
            gpus = matching or (max(present, key=_room),)
            if matching is None and calibration.metadata.machine.gpus:
                other.append(f"{_names(calibration)}, here it is {gpus[0].name}")
            drivers = {one.driver for one in gpus} - {None}
            newer += [
                f"driver {one.driver}, here it is {', '.join(sorted(map(str, drivers)))}"
                for one in calibration.metadata.machine.gpus[:1]
                if one.driver and drivers and one.driver not in drivers
            ]
            free = tuple(one.free_bytes for one in gpus)
            available = None if None in free else free  # type: ignore[assignment]
            if available is None:
                obstacle = "the driver does not say how much is free"
            if len(present) > len(gpus) and calibration.engine == "llama-server" and machine.gpu is None:
                notes.append(
                    f"judged for {gpus[0].name} alone; llama-server uses all {len(present)} GPUs unless told otherwise"
                )
    name = shlex.quote(calibration.id)
    if other:
        model = shlex.quote(calibration.metadata.model.name)
        notes.append(f"calibrated with {'; '.join((*other, *newer))}: harness calibrate {model} --variant NAME")
    elif newer:
        notes.append(f"calibrated with {'; '.join(newer)}: harness recalibrate {name}")
    return Chosen(
        calibration=calibration, path=path, gpus=gpus, available=available, obstacle=obstacle, warnings=tuple(notes)
    )  # fmt: skip


def _names(calibration: Calibration) -> str:
    return " + ".join(gpu.name for gpu in calibration.metadata.machine.gpus) or "host memory"


def check(
    questions: Sequence[Question],
    store: Store,
    machine: MachineNow,
    *,
    wanted: Wanted | None = None,
    available: tuple[int, ...] | None = None,
    extrapolate: bool = False,
) -> Check:
    """Verdicts; several models share what is free, in their order.

    Raises:
        UsageError: several engines have a model. BadInputError, ConfigError: a file that cannot be read.
    """
    wanted = wanted or Wanted()
    chosen = [choose(one, store, machine, wanted, available) for one in questions]
    verdicts: dict[int, tuple[Verdict, Fate | None]] = {}
    for places in _sharing(chosen):
        given = [(index, one) for index in places if isinstance(one := chosen[index], Chosen)]
        requests = [(one.calibration, questions[index].context, questions[index].num_parallel) for index, one in given]
        free = given[0][1].available
        if len(questions) == 1:
            verdicts[places[0]] = (judge(*requests[0], free, extrapolate=extrapolate), None)
        else:
            judged, fates = judge_together(requests, free, extrapolate=extrapolate)
            verdicts |= {index: pair for (index, _), pair in zip(given, zip(judged, fates, strict=True), strict=True)}
    models = tuple(
        _judged(question, one, verdicts.get(index), wanted, now=available is None)
        for index, (question, one) in enumerate(zip(questions, chosen, strict=True))
    )
    words = {one.word for one in models}
    worst: Word = "unknown" if "unknown" in words else "offload" if "offload" in words else "fits"
    if any(one.fate == "evicted" for one in models) and worst == "fits":
        worst = "offload"
    return Check(verdict=worst, models=models)


def _sharing(chosen: list[Chosen | str]) -> list[list[int]]:
    """Positions of models that share one memory."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(chosen):
        if isinstance(one, Chosen):
            key = (one.calibration.metadata.machine.target, *(gpu.uuid or gpu.key for gpu in one.gpus))
            groups.setdefault(key, []).append(index)
    return list(groups.values())


def _judged(
    question: Question, one: Chosen | str, found: tuple[Verdict, Fate | None] | None, wanted: Wanted, *, now: bool
) -> Judged:
    if isinstance(one, str) or found is None:
        engine = f" --engine {wanted.engine}" if wanted.engine else ""
        variant = f" --variant {wanted.variant}" if wanted.variant else ""
        return Judged(
            question=question, word="unknown", reason=str(one),
            advice=f"harness calibrate {shlex.quote(question.model)}{engine}{variant}",
        )  # fmt: skip
    verdict, fate = found
    warnings = [*one.warnings, *(verdict.warnings if verdict.verdict != "unknown" else ())]
    if now and (running := residents(one.calibration)):
        who = ", ".join(f"{each.engine} (process {each.pid})" for each in running)
        warnings.append(f"{one.calibration.metadata.model.name} is loaded already by {who}: this is about one more copy")
    reason, advice = verdict.reason, None
    if verdict.verdict == "unknown":
        reason, advice = (one.obstacle or reason), ADVICE if one.available is None else None
        train = one.calibration.metadata.model.train_context
        if question.context > one.calibration.metadata.quality.valid_to:
            advice = f"harness calibrate {shlex.quote(question.model)} --ctx 8192,16384,{question.context}"
            if train is not None and question.context > train:
                advice = f"the model was trained on {train} tokens; --extrapolate answers all the same"
    return Judged(
        question=question, word=verdict.verdict, chosen=one, verdict=verdict, fate=fate, reason=reason, advice=advice,
        warnings=tuple(dict.fromkeys(warnings)),
    )  # fmt: skip
