"""A calibration's verdicts as tables: for each offered context, slots and number of cards, what becomes of any free memory.

The planner of ``harness report`` looks an answer up here and decides nothing by itself. For one context everything that
``harness check`` says, but for the distance to what is free, is a step function of the free bytes: a table holds where it
steps and what holds from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import pairwise
from math import ceil, floor
from typing import Final, NamedTuple, TypeVar

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.memory import Prediction, predict
from harness.prediction.one_memory import OneMemory
from harness.prediction.placement import Placer
from harness.prediction.rules import LoadedModel, Rules
from harness.prediction.verdict import Outcome, Verdict, judge
from harness.units import CELL_PADDING, GIB

#: No planner is asked about more memory than this on one card, bytes.
MOST: Final = 4096 * GIB
#: Slots that are offered beside those of the calibration, and numbers of equal cards.
SLOTS: Final = (1, 2, 4)
CARDS: Final = (1, 2)
Value = TypeVar("Value", bound=Hashable)
#: Budgets that are tried to learn which layouts there are.
_TRIED: Final = 8


class PlannerAnswer(NamedTuple):
    """What holds from a step on. ``needs`` are the bytes that each device has to have free for nothing to be short."""

    verdict: Outcome
    tight: bool
    required_bytes: int
    reserve_bytes: int
    needs: tuple[int, ...]
    layers_total: int | None
    layers_offloaded: int | None
    layers_overflowing: int | None
    decode_tokens_per_s: float | None


class PlannerCell(msgspec.Struct, frozen=True, array_like=True):
    """One context, number of slots and of cards. ``steps`` are (free bytes of each card, index of an answer), ascending.

    ``evicts`` are (free bytes, whether the engine first ends another model). ``reason`` says why there is no answer.
    """

    steps: tuple[tuple[int, int], ...] = ()
    evicts: tuple[tuple[int, bool], ...] = ()
    reason: str | None = None


class PlannerTable(msgspec.Struct, frozen=True, kw_only=True):
    """All cells of a calibration: ``cells[cards][slots][context]``, by the places in those lists.

    ``most_loaded``: so many models are never loaded at once, ``None`` where the engine has no such limit. ``parts`` are bytes
    at each context for one slot: weights, overhead, fixed cache, compute, context cache; ``None`` where they are not known.
    """

    cards: tuple[int, ...]
    slots: tuple[int, ...]
    contexts: tuple[int, ...]
    answers: tuple[PlannerAnswer, ...]
    cells: tuple[tuple[tuple[PlannerCell, ...], ...], ...]
    most_loaded: int | None
    parts: tuple[tuple[int | None, ...] | None, ...]


def planner_table(calibration: Calibration, rules: Rules) -> PlannerTable:
    """The tables of a calibration, within its calibrated range."""
    metadata = calibration.metadata
    measured_on = max(len(metadata.machine.gpus), 1)
    spreads = metadata.machine.target == "gpu" and rules.spills
    cards = tuple(sorted({measured_on, *(CARDS if spreads else ())})) if measured_on == 1 else (measured_on,)
    own = metadata.settings.num_parallel
    slots, contexts = tuple(sorted({own, *SLOTS})), offered_contexts(calibration)
    answers: dict[PlannerAnswer, int] = {}
    cells = tuple(
        tuple(
            tuple(_cell(calibration, context, count, each, rules, answers, detailed=count == own) for context in contexts)
            for count in slots
        )
        for each in cards
    )
    return PlannerTable(
        cards=cards,
        slots=slots,
        contexts=contexts,
        answers=tuple(answers),
        cells=cells,
        most_loaded=rules.most_loaded(calibration, measured_on),
        parts=tuple(_parts(_predicted(calibration, context)) for context in contexts),
    )


def offered_contexts(calibration: Calibration) -> tuple[int, ...]:
    """Powers of two and what is half-way between them, the ends of the bands, the loads, and the end of the range."""
    quality = calibration.metadata.quality
    steps = [CELL_PADDING * 2**power for power in range(2, 20)]
    found = {*steps, *(step * 3 // 2 for step in steps), *(band.up_to for band in calibration.metadata.bands)}
    found |= {load.context for load in quality.loads}
    return tuple(sorted(context for context in {*found, quality.valid_to} if 0 < context <= quality.valid_to))


def _cell(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    cards: int,
    rules: Rules,
    answers: dict[PlannerAnswer, int],
    *,
    detailed: bool,
) -> PlannerCell:
    try:
        if cards == 1 and rules.spills:
            steps = tuple(_one(OneMemory(calibration, context, num_parallel, rules)))
        elif not rules.spills or (detailed and context & (context - 1) == 0):
            steps = tuple(_several(calibration, context, num_parallel, cards, rules))
        else:
            return PlannerCell(reason="several cards are listed at powers of two and the slots of the calibration")
    except UnknownVerdictError as error:
        return PlannerCell(reason=error.message)
    other = (LoadedModel(name="another"),)
    evicts = stepped(lambda free: bool(rules.evicted(calibration, context, num_parallel, (free,), ("GPU0",), other)), ())
    numbered = tuple((free, answers.setdefault(answer, len(answers))) for free, answer in steps)
    return PlannerCell(steps=numbered, evicts=tuple(evicts) if cards == 1 else ())


def _one(memory: OneMemory) -> Iterator[tuple[int, PlannerAnswer]]:
    """On one device, or in host memory."""

    def answer(free: int) -> PlannerAnswer:
        found = memory.at(free)
        required, verdict = found.needed.total_bytes, _word(found.spills)
        needs = (required + found.reserve,)
        return PlannerAnswer(
            verdict, found.tight, required, found.reserve, needs, found.layers_total, *found.layers, found.decode
        )

    guesses: set[int] = set()
    for start, needed in stepped(memory.needed, ()):
        reserve, doubt = memory.reserve(needed), needed.uncertainty_bytes
        top = needed.total_bytes + reserve
        guesses |= {start, top - doubt, top + doubt}
        guesses |= _layout_edges(memory.placer(needed), reserve + (needed.overhead_bytes or 0), reserve, top + doubt)
    return stepped(answer, guesses)


def _layout_edges(placer: Placer, beside: int, reserve: int, most: int) -> set[int]:
    """Free bytes at which another layout may begin: where one that was looked at just fits, which shows the next one."""
    edges: set[int] = set()
    new = {most * tried // _TRIED for tried in range(1, _TRIED + 1)}
    while new:
        for free in new:
            placer.place(free - reserve)
        edges |= new
        sizes = placer.sizes.values()
        new = {edge + beside for size in sizes for edge in (ceil(size), floor(size) + 1)} - edges
    return edges


def _word(spills: bool) -> Outcome:
    return "offload" if spills else "fits"


def _several(
    calibration: Calibration, context: int, num_parallel: int, cards: int, rules: Rules
) -> Iterator[tuple[int, PlannerAnswer]]:
    """On several cards with the same memory free on each, or of an engine that takes the same of each."""

    def judged(free: int) -> Verdict:
        return judge(calibration, context, num_parallel, (free,) * cards, rules, search=False)

    found = judged(MOST)
    if found.verdict == "unknown":
        raise UnknownVerdictError(found.reason or "unknown")
    required, reserve, doubt = found.required_bytes or 0, found.reserve_bytes or 0, found.uncertainty_bytes or 0
    needs = tuple(one.required_bytes + one.reserve_bytes for one in found.devices) or (required + reserve,)
    layers = (found.layers_total, found.layers_offloaded, found.layers_overflowing)
    enough = PlannerAnswer(found.verdict, found.tight, required, reserve, needs, *layers, found.decode_tokens_per_s)
    # What is required is shown as with enough memory: what an engine leaves out when it is short differs by every byte.
    short = enough._replace(layers_offloaded=None, layers_overflowing=None, decode_tokens_per_s=None)

    def verdict(free: int) -> tuple[Outcome, bool]:
        found = judged(free)
        return found.verdict, found.tight

    guesses = [1, *(max(needs) + sign * doubt + off for sign in (-1, 1) for off in (-1, 0, 1))]
    for free, (outcome, tight) in stepped(verdict, guesses):
        yield free, enough if outcome == "fits" else short._replace(verdict=outcome, tight=tight)


def stepped(value: Callable[[int], Value], guesses: Iterable[int]) -> Iterator[tuple[int, Value]]:
    """Where a step function of free bytes changes, from 0 to :data:`MOST`, and its value from there on.

    ``guesses`` are bytes where it may change: what changes twice between two of them and is the same at both is not seen.
    """
    known: dict[int, Value] = {}

    def at(free: int) -> Value:
        if free not in known:
            known[free] = value(free)
        return known[free]

    def changes(low: int, high: int) -> Iterator[int]:
        if at(low) == at(high):
            return
        if high - low == 1:
            yield high
            return
        middle = (low + high) // 2
        yield from changes(low, middle)
        yield from changes(middle, high)

    yield 0, at(0)
    edges = sorted({0, MOST, *(guess for guess in guesses if 0 < guess < MOST)})
    for low, high in pairwise(edges):
        for free in (*changes(low, high - 1), *changes(high - 1, high)):
            yield free, at(free)


def _predicted(calibration: Calibration, context: int) -> Prediction | None:
    try:
        return predict(calibration, context)
    except UnknownVerdictError:
        return None


def _parts(needed: Prediction | None) -> tuple[int | None, ...] | None:
    if needed is None or needed.weights_bytes is None:
        return None
    cache = (needed.compute_bytes, needed.context_cache_bytes)
    return (needed.weights_bytes, needed.overhead_bytes, needed.fixed_cache_bytes, *cache)
