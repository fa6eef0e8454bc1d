"""The question before a start: the calibration of a model that holds on this machine, what is free now, and the verdict."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.registry import policy_of
from harness.engines.running import held_by
from harness.engines.settings import shown_env
from harness.errors import BadInputError, UsageError
from harness.inventory.machine import LocalMachine, residents
from harness.inventory.weights import names_file
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.model.planned import Method
from harness.options import RunOptions
from harness.prediction.host import HostMemory, growth_of
from harness.prediction.memory import predict
from harness.prediction.together import Fate, judge_together
from harness.prediction.verdict import Outcome, Source, Verdict
from harness.serving.advice import calibrating
from harness.serving.calibration_lookup import (
    CalibrationFilter,
    CalibrationMatch,
    CheckRequest,
    choose,
    is_derived,
)
from harness.serving.surroundings import environment_of
from harness.store.store import Store


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of one model. ``details`` is ``None`` where it has no calibration; ``advice`` is what to do then.

    ``fate`` is set where several models are judged: ``resident``, ``offload``, ``evicted``. ``full_decode_tokens_per_s`` is
    the speed with everything on the target.
    """

    request: CheckRequest
    verdict: Outcome
    chosen: CalibrationMatch | None = None
    details: Verdict | None = None
    fate: Fate | None = None
    reason: str | None = None
    advice: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def full_decode_tokens_per_s(self) -> float | None:
        """Decode speed with everything on the target."""
        return None if self.chosen is None else self.chosen.calibration.metadata.performance.bounded.decode_tokens_per_s

    @property
    def decode_uncertainty(self) -> float | None:
        """How far a speed may be off, relative; ``None`` where none is said."""
        if self.chosen is None or self.details is None or self.details.decode_tokens_per_s is None:
            return None
        return self.chosen.calibration.metadata.performance.uncertainty

    @property
    def uncounted(self) -> str | None:
        """What a server of the user's takes beside what was measured; ``None``: nothing that is known."""
        return None if self.chosen is None or self.details is None else uncounted(self.chosen.calibration, self.details)

    def to_json(self) -> dict[str, object]:
        """One entry of ``check --json``'s ``models[]``."""
        document: dict[str, object] = {
            "model": self.request.model,
            "id": None if self.chosen is None else self.chosen.calibration.id,
            "variant": None if self.chosen is None else self.chosen.variant,
            "context": self.request.context,
            "num_parallel": self.request.num_parallel,
            "fate": self.fate,
            "verdict": self.verdict,
        }
        for field in FIELDS:
            document[field] = None if self.details is None else msgspec.to_builtins(getattr(self.details, field))
        document["uncounted"] = self.uncounted
        document["decode_uncertainty"] = self.decode_uncertainty
        document["identity"] = None if self.chosen is None else self.chosen.identity
        return {**document, "reason": self.reason, "advice": self.advice, "warnings": list(self.warnings)}


#: What a verdict that rests on an estimate says of its source.
SOURCES: Final[dict[Method, Source]] = {"dry run": "estimated", "formula": "formula"}
#: Names of the Hub that Ollama gives its models, too.
_HUB: Final = ("hf.co/", "huggingface.co/")
#: How addresses begin (:func:`harness.headers.sources.is_remote`, which is not loaded for a name).
_ADDRESSES: Final = ("https://", "http://", "hf://", *_HUB)
#: Fields of a verdict in ``check --json``.
FIELDS: Final = (
    *("basis", "source", "required_bytes", "reserve_bytes", "available_bytes", "short_bytes", "uncertainty_bytes"),
    *("margin_bytes", "tight", "max_context", "layers_total", "layers_offloaded", "layers_overflowing"),
    *("decode_tokens_per_s", "devices", "reasons", "host_required_bytes", "host_available_bytes", "host_short_bytes"),
    *("host_growth_bytes", "forced", "fits_by_rule", "out_of_memory", "at_most"),
)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of :func:`check`: the worst verdict over all models, and what is said of each of them."""

    verdict: Outcome
    models: tuple[Assessment, ...]

    @property
    def fits(self) -> bool:
        """Whether everything stays on its target."""
        return self.verdict == "fits"

    def to_json(self) -> dict[str, object]:
        """The object of ``check --json``: the fields of one model above; with several they stand in ``models[]`` alone."""
        models = [one.to_json() for one in self.models]
        above = {field: models[0][field] if len(models) == 1 else None for field in FIELDS}
        return {"verdict": self.verdict, **above, "models": models}


def check(
    questions: Sequence[CheckRequest],
    store: Store,
    machine: LocalMachine,
    *,
    wanted: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
    extrapolate: bool = False,
    measured_only: bool = False,
) -> Check:
    """Verdicts; several models share what is free, in their order.

    Raises:
        UsageError: no model, or several engines have one. BadInputError, ConfigError: a file that cannot be read.
    """
    if not questions:
        raise UsageError("no model is named", hint="MODEL@CTX", code="no-model")
    wanted = wanted or CalibrationFilter()
    chosen = [choose_or_estimate(one, store, machine, wanted, available, measured_only=measured_only) for one in questions]
    verdicts: dict[int, tuple[Verdict, Fate | None]] = {}
    host = host_of([one for one in chosen if isinstance(one, CalibrationMatch)], wanted, machine, here=available is None)
    for places in _sharing(chosen):
        given = [(index, one) for index in places if isinstance(one := chosen[index], CalibrationMatch)]
        requests = [
            (one.calibration, questions[index].context, questions[index].num_parallel, policy_of(one.calibration.engine))
            for index, one in given
        ]
        free, names = given[0][1].available, given[0][1].names
        loaded = given[0][1].loaded(machine if available is None else None)
        if free and len(free) == 1 and host.available is not None and given[0][1].calibration.metadata.machine.target == "host":
            free = (min(free[0], host.available),)  # models on GPUs have taken their part
        judged, fates = judge_together(
            requests, free, forced=wanted.forced, extrapolate=extrapolate, names=names, loaded=loaded, host=host
        )  # fmt: skip
        host = host.beside(verdict for verdict, fate in zip(judged, fates, strict=True) if fate != "evicted")
        fates = [None] if len(questions) == 1 else fates
        verdicts |= {index: pair for (index, _), pair in zip(given, zip(judged, fates, strict=True), strict=True)}
    models = tuple(
        _judged(question, one, verdicts.get(index), wanted, machine if available is None else None, store)
        for index, (question, one) in enumerate(zip(questions, chosen, strict=True))
    )
    outcomes = {one.verdict for one in models}
    worst: Outcome = "unknown" if "unknown" in outcomes else "offload" if "offload" in outcomes else "fits"
    if any(one.fate == "evicted" for one in models) and worst == "fits":
        worst = "offload"
    return Check(verdict=worst, models=models)


def uncounted(calibration: Calibration, verdict: Verdict) -> str | None:
    """What a server of the user's takes beside what was measured; ``None``: nothing that is known."""
    needed, rules = predict(calibration, verdict.context, verdict.num_parallel), policy_of(calibration.engine)
    growth = growth_of(calibration, verdict, needed, rules, None)
    return None if growth is None else growth.what


def host_of(chosen: Iterable[CalibrationMatch], wanted: CalibrationFilter, machine: LocalMachine, *, here: bool) -> HostMemory:
    """Host memory beside what is judged, as asked or read here, and the variables of the engines that run or would.

    ``here``: what is free was read on this machine.
    """
    some = {one.calibration.engine: one.calibration for one in chosen}
    return HostMemory(
        available=machine.host_bytes if wanted.host_available is None and here else wanted.host_available,
        environments={engine: environment_of(one, machine) for engine, one in some.items()},
    )


def check_start(
    question: CheckRequest,
    options: RunOptions,
    store: Store,
    machine: LocalMachine,
    wanted: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
    *,
    measured_only: bool = False,
) -> Assessment:
    """:func:`check` about a start with variables and GPUs of its own; where they are others than were calibrated it is unknown.

    ``machine`` is this one with those variables.
    """

    def ask(here: LocalMachine) -> Assessment:
        return check([question], store, here, wanted=wanted, available=available, measured_only=measured_only).models[0]

    judged = ask(machine)
    if judged.chosen is None and options.env:  # how the model is started is known all the same
        settings = " ".join(f"--env {shlex.quote(f'{name}={value}')}" for name, value in shown_env(options.env).items())
        advice = None if judged.advice is None else f"{judged.advice} {settings}"
        known = ask(LocalMachine(machine.gpu))
        return msgspec.structs.replace(known, verdict="unknown", details=None, reason=judged.reason, advice=advice)
    measured = None if judged.chosen is None else judged.chosen.calibration.metadata.machine
    if measured is None or measured.target == "host" or options.gpus != "none":
        return judged
    reason = f"it was calibrated on {measured.devices()}, and --gpus none leaves it in host memory"
    advice = f"harness calibrate {shlex.quote(question.model)} --gpus none --variant host"
    return msgspec.structs.replace(judged, verdict="unknown", details=None, reason=reason, advice=advice)


def is_address(model: str) -> bool:
    """Whether a model is named by where it stands on a network."""
    return model.startswith(_ADDRESSES)


def is_known_hub_name(model: str, store: Store, engine: str | None) -> bool:
    """Whether a name of the Hub is that of a calibration: Ollama calls its models so."""
    return model.startswith(_HUB) and bool(store.find(model, engine))


def is_readable(model: str) -> bool:
    """Whether its header may be read for an estimate: of an address, or of a file; nothing is opened."""
    return is_address(model) or names_file(model)


def choose_or_estimate(
    question: CheckRequest,
    store: Store,
    machine: LocalMachine,
    wanted: CalibrationFilter,
    available: tuple[int, ...] | None,
    *,
    measured_only: bool = False,
) -> CalibrationMatch | str:
    """The calibration that answers, else an estimate where a header can be read; or why there is neither.

    Raises:
        HarnessError: of a file or an address that was to be read. Otherwise as
            :func:`harness.serving.calibration_lookup.choose`.
    """
    named = is_known_hub_name(question.model, store, wanted.engine)
    remote = is_address(question.model) and not named
    found: CalibrationMatch | str = f"{question.model} is an address, and its weights are not here to be compared"
    if not remote:
        found = choose(question, store, machine, wanted, available)
    if not isinstance(found, str) or measured_only or named or not is_readable(question.model):
        return found
    if not remote and not Path(question.model).expanduser().is_file():
        return f"{found}; and there is no such file"
    from harness.serving.estimates import estimate

    try:
        return estimate(question, store, machine, wanted, available) or found
    except BadInputError as error:
        if remote:
            raise
        return f"{found}; and {error.message}"


def _sharing(chosen: list[CalibrationMatch | str]) -> list[list[int]]:
    """Positions of models that share one memory."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(chosen):
        if isinstance(one, CalibrationMatch):
            key = (one.calibration.metadata.machine.target, *(gpu.uuid or gpu.key for gpu in one.gpus))
            groups.setdefault(key, []).append(index)
    return list(groups.values())


def _judged(
    question: CheckRequest,
    one: CalibrationMatch | str,
    found: tuple[Verdict, Fate | None] | None,
    wanted: CalibrationFilter,
    machine: LocalMachine | None,
    store: Store,
) -> Assessment:
    """``machine`` is what the verdict is about; ``None``: a card that is not here."""
    if isinstance(one, str) or found is None:
        return Assessment(
            request=question, verdict="unknown", reason=str(one), advice=calibrating(question.model, wanted, store)
        )
    verdict, fate = found
    if one.derived or is_derived(one.calibration, question.num_parallel):
        verdict = msgspec.structs.replace(verdict, source="derived")
    if one.method is not None:
        verdict = msgspec.structs.replace(verdict, source=SOURCES[one.method])
    warnings = [*one.warnings, *(verdict.warnings if verdict.verdict != "unknown" else ())]
    if machine is not None and (running := residents(one.calibration)):
        who = ", ".join(f"{each.engine} (process {each.pid})" for each in running)
        warnings.append(f"{one.calibration.metadata.model.name} is loaded already by {who}: this is about one more copy")
    if machine is not None:
        title, ended = policy_of(one.calibration.engine).title, ended_for(verdict, one.calibration.engine, machine)
        warnings += [f"{title} ends {model}, which is loaded now, for this one: --explain says why" for model in ended]
    if machine is not None and verdict.verdict == "offload":
        warnings += held_by(one.calibration.engine, machine.running(one.calibration.engine))
        if shared := [gpu.name for gpu in one.gpus if gpu.shared]:
            warnings.append(f"{shared[0]} shares the machine's memory: layers that go to the host take the same memory")
    reason, advice = verdict.reason, None
    if verdict.verdict == "unknown":
        reason, advice = (one.obstacle or reason), one.advice if one.available is None else None
        train = one.calibration.metadata.model.train_context
        if question.context > one.calibration.metadata.quality.valid_to:
            contexts = ",".join(str(question.context // part) for part in (4, 2, 1) if question.context >= part)
            advice = calibrating(question.model, wanted, store, contexts, one)
            if train is not None and question.context > train:
                advice = f"the model was trained on {train:,} tokens; --extrapolate answers all the same"
    return Assessment(
        request=question, verdict=verdict.verdict, chosen=one, details=verdict, fate=fate, reason=reason, advice=advice,
        warnings=tuple(dict.fromkeys(warnings)),
    )  # fmt: skip


def ended_for(verdict: Verdict, engine: EngineName, machine: LocalMachine) -> list[str]:
    """The models that run now and that the engine ends for one."""
    held = {model.name for server in machine.running(engine) for model in server.models}
    return [one.model for one in verdict.reasons if one.step.startswith("evict-") and one.model in held]
