"""``harness plan``: for a card or this machine, the largest context of each calibrated model, and which fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from harness.engines.registry import policy_of
from harness.engines.running import held_by
from harness.errors import HarnessError, NotFoundError, UnknownVerdictError, UsageError
from harness.inventory.machine import LocalMachine
from harness.prediction.forced import Forced
from harness.prediction.host import HostMemory
from harness.prediction.memory import decode_at_depth, predict
from harness.prediction.packing import PackedModel, Packings, pack
from harness.prediction.rules import LoadedModel, Rules
from harness.prediction.together import Fate, judge_together
from harness.prediction.verdict import Verdict, largest_where, named
from harness.serving.advice import calibrating
from harness.serving.calibration_lookup import CalibrationFilter, CalibrationMatch, CheckRequest, read_question
from harness.serving.check import SOURCES, choose_or_estimate, ended_for, host_of, uncounted
from harness.store.store import Store

#: Context at which models are put together, tokens per slot, where none is given.
TOGETHER: Final = 8192
#: So many models are counted, fewer named.
_NAMED: Final = 4
#: Sets that are shown.
SHOWN: Final = 6


class CapacityRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model: ``largest_context`` tokens per slot (0: none fits, ``None``: not known) and what it takes there, bytes.

    The largest context is one at which ``check`` says that it fits. ``verdict`` is at that context, or at the smallest that was
    asked about where none fits. ``full_decode_tokens_per_s`` is the speed when the context is full. ``reason`` says why nothing
    is known. ``alias`` is the name where several have the model's.
    """

    request: CheckRequest
    chosen: CalibrationMatch
    largest_context: int | None
    verdict: Verdict
    weights_bytes: int | None
    full_decode_tokens_per_s: float | None
    reason: str | None = None
    alias: str | None = None

    @property
    def name(self) -> str:
        """The model, as people call it."""
        if self.alias is not None:
            return self.alias
        variant = f"@{self.chosen.variant}" if self.chosen.variant else ""
        estimated = " (estimated)" if self.chosen.method is not None else ""
        return self.chosen.calibration.metadata.model.name + variant + estimated

    @property
    def uncounted(self) -> str | None:
        """What its server may come to take of host memory, in words; ``None``: nothing that is known."""
        return uncounted(self.chosen.calibration, self.verdict)

    def to_json(self) -> dict[str, object]:
        """One entry of ``models[]``."""
        metadata = self.chosen.calibration.metadata
        fields = ("verdict", "context", "required_bytes", "reserve_bytes", "available_bytes", "short_bytes", "layers_total")
        more = ("layers_offloaded", "layers_overflowing", "decode_tokens_per_s", "uncertainty_bytes", "tight", "at_most")
        host = ("host_required_bytes", "host_available_bytes", "host_short_bytes", "host_growth_bytes")
        return {
            "model": self.chosen.calibration.metadata.model.name,
            "id": self.chosen.calibration.id,
            "variant": self.chosen.variant,
            "basis": metadata.machine.target,
            "source": self.verdict.source if self.chosen.method is None else SOURCES[self.chosen.method],
            "largest_context": self.largest_context,
            "train_context": metadata.model.train_context,
            "valid_to": metadata.quality.valid_to,
            "weights_bytes": self.weights_bytes,
            **{field: getattr(self.verdict, field) for field in (*fields, *more, *host)},
            "uncounted": self.uncounted,
            "full_decode_tokens_per_s": self.full_decode_tokens_per_s,
            "reason": self.reason,
        }


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Models that stay loaded together, each at its context, where the largest is started first. Bytes.

    ``tight``: they fit, and the host could not hold ``host_growth_bytes`` beside them, which their servers may come to take.
    ``largest_context``: up to so many tokens a slot all of them stay (each to the end of its range). ``cards`` say what each
    device holds of each model.
    """

    models: tuple[str, ...]
    contexts: tuple[int, ...]
    fates: tuple[Fate | None, ...]
    required_bytes: int
    tight: bool
    host_growth_bytes: int
    largest_context: int
    cards: dict[str, dict[str, int]]


class CardMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a memory; bytes."""

    name: str
    available_bytes: int
    total_bytes: int | None


class KeptLoaded(msgspec.Struct, frozen=True, kw_only=True):
    """Why sets with room enough are left out: the engine ends models by a rule of its own (``step``, as in ``reasons[]``).

    The step ``host-memory``: the host cannot hold the parts that are there.
    """

    engine: str
    step: str
    figures: dict[str, int]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One memory: the host's, a GPU's, or cards that were described. ``groups`` are the largest sets that stay together.

    ``available_bytes`` and ``total_bytes`` of several cards are sums, which say nothing of a model: ``cards`` has each.
    ``all_sets`` is false where there were more sets of models than could be tried.
    """

    name: str
    available_bytes: int | None
    total_bytes: int | None
    reserve_bytes: int | None
    rows: tuple[CapacityRow, ...]
    groups: tuple[Group, ...]
    cards: tuple[CardMemory, ...] = ()
    limits: tuple[KeptLoaded, ...] = ()
    all_sets: bool = True

    def to_json(self) -> dict[str, object]:
        """One entry of ``plan --json``'s ``memories[]``."""
        return {
            "name": self.name,
            "available_bytes": self.available_bytes,
            "total_bytes": self.total_bytes,
            "reserve_bytes": self.reserve_bytes,
            "cards": msgspec.to_builtins(self.cards),
            "models": [row.to_json() for row in self.rows],
            "together": msgspec.to_builtins(self.groups),
            "limits": msgspec.to_builtins(self.limits),
            "all_sets": self.all_sets,
        }


class CapacityPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of :func:`plan`; ``warnings`` are for the user."""

    memories: tuple[Memory, ...]
    warnings: tuple[str, ...] = ()


def plan(
    specs: Sequence[str],
    store: Store,
    machine: LocalMachine,
    *,
    wanted: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
    num_parallel: int = 1,
    context: int = TOGETHER,
    measured_only: bool = False,
    prefer: Sequence[str] = (),
) -> CapacityPlan:
    """The plan of some models, or of all that are calibrated.

    Args:
        specs: as for ``check``; empty: every calibrated model. ``MODEL@CTX`` is the context at which it is put together.
        store: where calibrations are.
        machine: what is free where ``available`` is ``None``.
        wanted: which of several calibrations.
        available: bytes of each device of a card that is not read here.
        num_parallel: slots.
        context: at which models are put together, tokens per slot.
        measured_only: no estimates of models without a calibration.
        prefer: models that sets should have, the most wanted first, as in ``specs``.

    Raises:
        UsageError: nonsense. UnknownVerdictError: a model that was named has no calibration that answers, or the only one
            was measured with other slots, and its parts are unknown. NotFoundError: a path to no file.
    """
    warnings: list[str] = []
    rows: list[CapacityRow] = []
    refused: UsageError | None = None
    for question in _questions(specs, store, num_parallel, context):
        try:
            chosen = choose_or_estimate(
                question, store, machine, wanted or CalibrationFilter(), available, measured_only=measured_only
            )
        except HarnessError as error:
            if specs:
                raise
            warnings.append(error.message)  # one damaged file does not hide the others
            refused = error if isinstance(error, UsageError) else refused
            continue
        if isinstance(chosen, str):
            if specs:
                advice = calibrating(question.model, wanted or CalibrationFilter(), store)
                raise UnknownVerdictError(f"UNCALIBRATED: {chosen}", hint=advice, code="uncalibrated")
            warnings.append(chosen)
            continue
        warnings += chosen.warnings
        try:
            loaded = chosen.loaded(machine if available is None else None)
            host = host_of([chosen], wanted or CalibrationFilter(), machine, here=available is None)
            rows.append(_row(question, chosen, (wanted or CalibrationFilter()).forced, loaded, host))
        except UnknownVerdictError as error:
            if len(specs) == 1:
                raise
            warnings.append(f"{question.model}: {error.message}{f' ({error.hint})' if error.hint else ''}")
    if refused is not None and not rows:
        raise refused  # slots, for one, that no engine here can have
    counted = Counter(row.name for row in rows)
    rows = [msgspec.structs.replace(row, alias=_names_of(row)[2] if counted[row.name] > 1 else None) for row in rows]
    if available is None:
        warnings += _residents(rows, machine)
    preferred = [str(one.chosen.path) for spec in prefer for one in rows if spec in _names_of(one)]
    if missing := [spec for spec in prefer if not any(spec in _names_of(one) for one in rows)]:
        raise NotFoundError(f"--prefer names what is not planned: {', '.join(missing)}", code="not-planned")
    forced = (wanted or CalibrationFilter()).forced
    host = host_of([row.chosen for row in rows], wanted or CalibrationFilter(), machine, here=available is None)
    memories = tuple(
        _memory(name, some, preferred, forced, machine if available is None else None, host)
        for name, some in _by_memory(rows).items()
    )
    return CapacityPlan(memories=memories, warnings=tuple(dict.fromkeys(warnings)))


def _residents(rows: Sequence[CapacityRow], machine: LocalMachine) -> Iterator[str]:
    """What runs now, and what of it an engine ends for a model of the plan."""
    for engine in dict.fromkeys(row.chosen.calibration.engine for row in rows):
        yield from held_by(engine, machine.running(engine))
        ended: dict[str, list[str]] = {}
        for row in rows:
            for model in ended_for(row.verdict, engine, machine) if row.chosen.calibration.engine == engine else ():
                ended.setdefault(model, []).append(row.name)
        for model, some in ended.items():
            those = ", ".join(some) if len(some) < _NAMED else f"{len(some)} of these models"
            yield f"{policy_of(engine).title} ends {model}, which is loaded now, for {those}"


def _questions(specs: Sequence[str], store: Store, num_parallel: int, context: int) -> Iterator[CheckRequest]:
    if specs:
        yield from (read_question(spec, context, num_parallel) for spec in specs)
        return
    yield from (CheckRequest(model=one, context=context, num_parallel=num_parallel) for one in store.ids())


def _row(
    question: CheckRequest,
    chosen: CalibrationMatch,
    forced: Forced,
    loaded: Sequence[tuple[Rules, LoadedModel]],
    host: HostMemory,
) -> CapacityRow:
    """A model by itself, beside what runs (``loaded``) unless its engine ends that for it."""
    calibration, slots = chosen.calibration, question.num_parallel
    top, rules = calibration.metadata.quality.valid_to, policy_of(calibration.engine)

    def judged(context: int, *, search: bool) -> Verdict:
        request = (calibration, context, slots, rules)
        (verdict,), _ = judge_together(
            [request], chosen.available, forced=forced, names=chosen.names, search=search, loaded=loaded, host=host
        )
        return verdict

    first = judged(min(question.context, top), search=True)
    largest = first.max_context
    if loaded and first.verdict != "unknown":  # a larger context may have the engine end more of what runs
        largest = largest_where(calibration, lambda context: judged(context, search=False).verdict == "fits")
    verdict = msgspec.structs.replace(judged(largest, search=False), max_context=largest) if largest else first
    reason = (chosen.obstacle or verdict.reason) if verdict.verdict == "unknown" else None
    if largest is None and verdict.verdict == "offload":
        reason = "a shorter context may fit or not: what it takes is known as a bound alone"
    return CapacityRow(
        request=question, chosen=chosen, largest_context=largest, verdict=verdict, reason=reason,
        weights_bytes=predict(calibration, top, slots).weights_bytes,
        full_decode_tokens_per_s=decode_at_depth(calibration, largest) if largest else None,
    )  # fmt: skip


def _by_memory(rows: list[CapacityRow]) -> dict[tuple[str, ...], list[CapacityRow]]:
    found: dict[tuple[str, ...], list[CapacityRow]] = {}
    for row in rows:
        target = row.chosen.calibration.metadata.machine.target
        found.setdefault((target, *(gpu.uuid or gpu.key for gpu in row.chosen.gpus)), []).append(row)
    return found


def _names_of(row: CapacityRow) -> tuple[str, ...]:
    return row.request.model, row.name, row.chosen.calibration.id, row.chosen.calibration.metadata.model.name


def _memory(
    key: tuple[str, ...],
    rows: list[CapacityRow],
    preferred: Sequence[str],
    forced: Forced,
    machine: LocalMachine | None,
    host: HostMemory,
) -> Memory:
    """``machine`` is ``None`` for cards that are not here."""
    chosen = rows[0].chosen
    names = " + ".join(gpu.name for gpu in chosen.gpus)
    totals = [gpu.total_bytes for gpu in chosen.gpus]
    name = "host memory" if key[0] == "host" else names or "GPU" if machine else _cards(chosen.available)
    rows = sorted(rows, key=lambda row: row.verdict.required_bytes or row.weights_bytes or 0)
    free = chosen.available or ()
    if key[0] == "host" and len(free) > 1:
        free = ()  # several cards are not the host's memory
    packed, groups = _groups(rows, free, preferred, forced, chosen.loaded(machine), host)
    return Memory(
        name=name,
        available_bytes=sum(free) if free else None,
        total_bytes=None if not totals or None in totals else sum(filter(None, totals)),
        reserve_bytes=max((row.verdict.reserve_bytes or 0 for row in rows), default=None),
        rows=tuple(rows),
        groups=tuple(groups),
        cards=tuple(
            CardMemory(name=card, available_bytes=size, total_bytes=total)
            for card, size, total in zip(named(free, chosen.names), free, totals or [None] * len(free), strict=True)
        )
        if key[0] != "host"
        else (),
        limits=tuple(KeptLoaded(engine=title, step=step, figures=dict(figures)) for title, step, figures in packed.limits),
        all_sets=packed.complete,
    )


def _cards(available: tuple[int, ...] | None) -> str:
    return "a card" if available is None or len(available) == 1 else f"{len(available)} cards"


def _groups(
    rows: list[CapacityRow],
    available: tuple[int, ...],
    preferred: Sequence[str],
    forced: Forced,
    loaded: Sequence[tuple[Rules, LoadedModel]],
    host: HostMemory,
) -> tuple[Packings, list[Group]]:
    """The largest sets that stay loaded; over several devices each model is laid over what those before it leave."""
    usable = [row for row in rows if row.largest_context]
    if not available or len(usable) < 2:
        return Packings((), (), complete=True), []
    models = []
    for row in usable:
        calibration, context = row.chosen.calibration, min(row.request.context, row.largest_context or 0)
        size = predict(calibration, context, row.request.num_parallel).total_bytes
        reserve = min((one.reserve_bytes for one in row.verdict.devices), default=row.verdict.reserve_bytes or 0)
        rules = policy_of(calibration.engine)
        models.append(PackedModel(calibration, context, row.request.num_parallel, rules, size, reserve))
    places = {str(row.chosen.path): index for index, row in enumerate(usable)}
    first = [places[one] for one in preferred if one in places]
    found = pack(
        models, available, preferred=first, names=rows[0].chosen.names, forced=forced, shown=SHOWN, loaded=loaded, host=host
    )  # fmt: skip
    groups = []
    for one in found.found:
        placed = dict(sorted(zip(one.members, one.verdicts, strict=True)))
        cards: dict[str, dict[str, int]] = {}
        for member, verdict in placed.items():
            for device in verdict.devices:
                cards.setdefault(device.name, {})[usable[member].name] = device.required_bytes
        groups.append(
            Group(
                models=tuple(usable[member].name for member in placed),
                contexts=tuple(models[member].context for member in placed),
                fates=tuple("resident" for _ in placed),
                required_bytes=sum(verdict.required_bytes or 0 for verdict in placed.values()),
                tight=any(verdict.tight for verdict in one.verdicts),
                host_growth_bytes=sum(verdict.host_growth_bytes or 0 for verdict in one.verdicts),
                largest_context=one.largest_context,
                cards=cards,
            )
        )
    return found, groups
