"""``harness plan``: for a card or this machine, the largest context of each calibrated model, and which fit together."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final

import msgspec

from harness.engines.registry import policy_of
from harness.engines.running import held_by
from harness.errors import HarnessError, NotFoundError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.prediction.forced import Forced, judge_as_asked
from harness.prediction.memory import decode_at_depth, predict
from harness.prediction.rules import Rules
from harness.prediction.together import Fate, judge_together
from harness.prediction.verdict import Verdict
from harness.serving.calibration_lookup import CalibrationFilter, CalibrationMatch, CheckRequest, read_question
from harness.serving.check import SOURCES, choose_or_estimate
from harness.store.store import Store, stem_of

#: Context at which models are put together, tokens per slot, where none is given.
TOGETHER: Final = 8192
#: Models of which every combination is tried; of more, the smallest.
_MOST: Final = 12
#: Combinations that are shown.
SHOWN: Final = 6


class CapacityRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model: ``largest_context`` tokens per slot (0: none fits, ``None``: not known) and what it takes there, bytes.

    ``verdict`` is at that context, or at the smallest that was asked about where none fits. ``full_decode_tokens_per_s`` is the
    speed when the context is full. ``reason`` says why nothing is known.
    """

    request: CheckRequest
    chosen: CalibrationMatch
    largest_context: int | None
    verdict: Verdict
    weights_bytes: int | None
    full_decode_tokens_per_s: float | None
    reason: str | None = None

    @property
    def name(self) -> str:
        """The model, as people call it."""
        variant = f"@{self.chosen.variant}" if self.chosen.variant else ""
        estimated = " (estimated)" if self.chosen.method is not None else ""
        return self.chosen.calibration.metadata.model.name + variant + estimated

    def to_json(self) -> dict[str, object]:
        """One entry of ``models[]``."""
        metadata = self.chosen.calibration.metadata
        fields = ("verdict", "context", "required_bytes", "reserve_bytes", "available_bytes", "short_bytes", "layers_total")
        more = ("layers_offloaded", "layers_overflowing", "decode_tokens_per_s")
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
            **{field: getattr(self.verdict, field) for field in (*fields, *more)},
            "full_decode_tokens_per_s": self.full_decode_tokens_per_s,
            "reason": self.reason,
        }


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Models that run at once, each at its context; ``fates`` say what becomes of each. Bytes."""

    models: tuple[str, ...]
    contexts: tuple[int, ...]
    fates: tuple[Fate | None, ...]
    required_bytes: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One memory: the host's, a GPU's, or a card that was described. ``groups`` are the largest that fit together."""

    name: str
    available_bytes: int | None
    total_bytes: int | None
    reserve_bytes: int | None
    rows: tuple[CapacityRow, ...]
    groups: tuple[Group, ...]

    def to_json(self) -> dict[str, object]:
        """One entry of ``plan --json``'s ``memories[]``."""
        return {
            "name": self.name,
            "available_bytes": self.available_bytes,
            "total_bytes": self.total_bytes,
            "reserve_bytes": self.reserve_bytes,
            "models": [row.to_json() for row in self.rows],
            "together": msgspec.to_builtins(self.groups),
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

    Raises:
        NotFoundError: a model that was named has no calibration. UsageError: nonsense.
    """
    warnings: list[str] = []
    rows: list[CapacityRow] = []
    for question in _questions(specs, store, num_parallel, context):
        try:
            chosen = choose_or_estimate(
                question, store, machine, wanted or CalibrationFilter(), available, measured_only=measured_only
            )
        except HarnessError as error:
            if specs:
                raise
            warnings.append(error.message)  # one damaged file does not hide the others
            continue
        if isinstance(chosen, str):
            if specs:
                raise NotFoundError(chosen, hint=f"harness calibrate {shlex.quote(question.model)}", code="no-calibration")
            warnings.append(chosen)
            continue
        warnings += chosen.warnings
        rows.append(_row(question, chosen, (wanted or CalibrationFilter()).forced))
    if available is None:
        for engine in dict.fromkeys(row.chosen.calibration.engine for row in rows):
            warnings += held_by(engine, machine.running(engine))
    memories = tuple(_memory(name, some, given=available is not None) for name, some in _by_memory(rows).items())
    return CapacityPlan(memories=memories, warnings=tuple(dict.fromkeys(warnings)))


def _questions(specs: Sequence[str], store: Store, num_parallel: int, context: int) -> Iterator[CheckRequest]:
    if specs:
        yield from (read_question(spec, context, num_parallel) for spec in specs)
        return
    ids = dict.fromkeys(f"{path.parent.name}/{stem_of(path)}" for path in store.paths())
    yield from (CheckRequest(model=one, context=context, num_parallel=num_parallel) for one in ids)


def _row(question: CheckRequest, chosen: CalibrationMatch, forced: Forced) -> CapacityRow:
    calibration, slots = chosen.calibration, question.num_parallel
    top, rules = calibration.metadata.quality.valid_to, policy_of(calibration.engine)
    free, names = chosen.available, chosen.names
    first = judge_as_asked(calibration, min(question.context, top), slots, free, rules, forced, names=names)
    largest = first.max_context
    verdict = judge_as_asked(calibration, largest, slots, free, rules, forced, names=names) if largest else first
    reason = (chosen.obstacle or verdict.reason) if verdict.verdict == "unknown" else None
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


def _memory(key: tuple[str, ...], rows: list[CapacityRow], *, given: bool) -> Memory:
    chosen = rows[0].chosen
    names = " + ".join(gpu.name for gpu in chosen.gpus)
    totals = [gpu.total_bytes for gpu in chosen.gpus]
    name = "host memory" if key[0] == "host" else _cards(chosen.available) if given else names or "GPU"
    rows = sorted(rows, key=lambda row: row.verdict.required_bytes or row.weights_bytes or 0)
    return Memory(
        name=name,
        available_bytes=None if chosen.available is None else sum(chosen.available),
        total_bytes=None if not totals or None in totals else sum(filter(None, totals)),
        reserve_bytes=max((row.verdict.reserve_bytes or 0 for row in rows), default=None),
        rows=tuple(rows),
        groups=tuple(_groups(rows, chosen.available)),
    )


def _cards(available: tuple[int, ...] | None) -> str:
    return "a card" if available is None or len(available) == 1 else f"{len(available)} cards"


def _groups(rows: list[CapacityRow], available: tuple[int, ...] | None) -> list[Group]:
    """The largest combinations that fit: on one device memory adds up, and the last one started finds its engine's reserve.

    Over several devices nothing is said of a combination by their sum: each model is laid over what those before it leave.
    """
    usable = [row for row in rows if row.largest_context][:_MOST]
    if available is None or len(usable) < 2:
        return []
    contexts = [min(row.request.context, row.largest_context or 0) for row in usable]
    sizes = [
        predict(row.chosen.calibration, context, row.request.num_parallel).total_bytes
        for row, context in zip(usable, contexts, strict=True)
    ]
    reserves = [row.verdict.reserve_bytes or 0 for row in usable]
    fitting: list[frozenset[int]] = []
    names = usable[0].chosen.names

    def requests_of(some: Sequence[int]) -> list[tuple[Calibration, int, int, Rules]]:
        chosen = [(usable[one].chosen.calibration, contexts[one], usable[one].request.num_parallel) for one in some]
        return [(calibration, context, slots, policy_of(calibration.engine)) for calibration, context, slots in chosen]

    def fits(some: Sequence[int]) -> bool:
        if sum(sizes[one] for one in some) + max(reserves[one] for one in some) > sum(available):
            return False
        return len(available) == 1 or set(judge_together(requests_of(some), available, names=names)[1]) == {"resident"}

    for count in range(len(usable), 1, -1):
        for some in combinations(range(len(usable)), count):
            if any(set(some) <= larger for larger in fitting):
                continue
            if fits(some):
                fitting.append(frozenset(some))
    groups = []
    for found in fitting[:SHOWN]:
        members = sorted(found)
        _, fates = judge_together(requests_of(members), available, names=names)
        groups.append(
            Group(
                models=tuple(usable[one].name for one in members),
                contexts=tuple(contexts[one] for one in members),
                fates=tuple(fates),
                required_bytes=sum(sizes[one] for one in members),
            )
        )
    return groups
