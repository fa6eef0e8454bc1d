"""A calibration's verdicts as tables: for each offered context, slots and number of cards, what becomes of any free memory.

The planner of ``harness report`` looks an answer up here and decides nothing by itself. For one context everything that
``harness check`` says, but for the distance to what is free, is a step function of the free bytes: a table holds where it
steps and what holds from there on. Where the steps are follows from the sizes of the layouts
(:func:`harness.prediction.layout.steps`), so that a cell takes a question for each step, not a search.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from itertools import pairwise
from math import ceil
from typing import Final, NamedTuple, TypeVar

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.layout import Layout
from harness.prediction.memory import Prediction, is_bound, predict
from harness.prediction.one_memory import OneMemory, decode_speed, layers_total
from harness.prediction.placement import Placer, placed_on
from harness.prediction.rules import LoadedModel, Rules
from harness.prediction.verdict import Kept, Outcome, Verdict, judge
from harness.units import CELL_PADDING, GIB, from_gib

#: No planner is asked about more memory than this on one card, bytes.
MOST: Final = 4096 * GIB
#: Slots that are offered beside those of the calibration, and numbers of equal cards.
SLOTS: Final = (1, 2, 4)
CARDS: Final = (1, 2)
Value = TypeVar("Value", bound=Hashable)
#: Free bytes and the number of what holds from there on: of answers, and of layouts.
_Steps = tuple[list[tuple[int, int]], list[tuple[int, int]]]


class PlannerAnswer(NamedTuple):
    """What holds from a step on. ``needs`` are the bytes that each device has to have free for nothing to be short.

    ``growth`` is what a server in host memory may come to take beside it, with the variables of the calibration; from ``calm``
    free bytes on that fits as well.
    """

    verdict: Outcome
    tight: bool
    required_bytes: int
    reserve_bytes: int
    needs: tuple[int, ...]
    growth: int = 0
    calm: int = 0


class PlannerLayout(NamedTuple):
    """Where the layers are, and the speed that it gives; ``None`` is not known."""

    layers_offloaded: int | None
    layers_overflowing: int | None
    decode_tokens_per_s: float | None


class PlannerCell(msgspec.Struct, frozen=True, array_like=True):
    """One context, number of slots and of cards.

    ``steps`` are free bytes of each card and the index of the answer from there on, in turn; ``layouts`` the same with the
    index of a layout. ``evicts`` with whether the engine first ends another model. ``reason`` says why there is
    no answer.
    """

    steps: tuple[int, ...] = ()
    layouts: tuple[int, ...] = ()
    evicts: tuple[int, ...] = ()
    reason: str | None = None


class PlannerTable(msgspec.Struct, frozen=True, kw_only=True):
    """All cells of a calibration: ``cells[cards][slots][context]``, by the places in those lists.

    ``most_loaded``: so many models are never loaded at once, ``None`` where the engine has no such limit. ``parts`` are bytes
    at each context for one slot: weights, overhead, fixed cache, compute, context cache; ``None`` where they are not known.
    ``layers_total`` counts the output layer. ``at_most``: of each context, whether what it takes is a bound from above.
    ``uncounted`` says in words what a server may take of host memory later.
    """

    cards: tuple[int, ...]
    slots: tuple[int, ...]
    contexts: tuple[int, ...]
    answers: tuple[PlannerAnswer, ...]
    layouts: tuple[PlannerLayout, ...]
    layers_total: int | None
    cells: tuple[tuple[tuple[PlannerCell, ...], ...], ...]
    most_loaded: int | None
    parts: tuple[tuple[int | None, ...] | None, ...]
    at_most: tuple[bool, ...]
    uncounted: str | None


def planner_table(calibration: Calibration, rules: Rules) -> PlannerTable:
    """The tables of a calibration, within its calibrated range."""
    metadata = calibration.metadata
    measured_on = max(len(metadata.machine.gpus), 1)
    spreads = metadata.machine.target == "gpu" and rules.spills
    cards = tuple(sorted({measured_on, *(CARDS if spreads else ())})) if measured_on == 1 else (measured_on,)
    slots, contexts = tuple(sorted({metadata.settings.num_parallel, *SLOTS})), offered_contexts(calibration)
    maker = _Maker(calibration, rules)
    cells = tuple(tuple(tuple(maker.cell(context, count, each) for context in contexts) for count in slots) for each in cards)
    return PlannerTable(
        cards=cards,
        slots=slots,
        contexts=contexts,
        answers=tuple(maker.answers),
        layouts=tuple(maker.layouts),
        layers_total=layers_total(calibration),
        cells=cells,
        most_loaded=rules.most_loaded(calibration, measured_on),
        parts=tuple(_parts(_predicted(calibration, context)) for context in contexts),
        at_most=tuple(is_bound(calibration, context) for context in contexts),
        uncounted=maker.uncounted,
    )


def offered_contexts(calibration: Calibration) -> tuple[int, ...]:
    """Powers of two and what is half-way between them, the ends of the bands, the loads, and the end of the range."""
    quality = calibration.metadata.quality
    steps = [CELL_PADDING * 2**power for power in range(3, 20)]
    found = {*steps, *(step * 3 // 2 for step in steps), *(band.up_to for band in calibration.metadata.bands)}
    found |= {load.context for load in quality.loads}
    return tuple(sorted(context for context in {*found, quality.valid_to} if 0 < context <= quality.valid_to))


class _Maker:
    """Makes the cells of one calibration, and numbers their answers and layouts."""

    def __init__(self, calibration: Calibration, rules: Rules) -> None:
        self.calibration, self.rules = calibration, rules
        self.answers: dict[PlannerAnswer, int] = {}
        self.layouts: dict[PlannerLayout, int] = {}
        self._of_engine: dict[Layout, int] = {}  # what it says does not depend on context or slots
        self.on_host = on_host = calibration.metadata.machine.target == "host"
        self.uncounted: str | None = None
        total, overflowing = (None, None) if on_host else (layers_total(calibration), 0)
        self._whole = self._layout(total, overflowing, decode_speed(calibration, None))
        self._unknown = self._layout(None, None, None)

    def cell(self, context: int, num_parallel: int, cards: int) -> PlannerCell:
        """What becomes of a context with so many slots on equal cards."""
        own = num_parallel == self.calibration.metadata.settings.num_parallel
        try:
            if cards == 1 and self.rules.spills:
                steps, layouts = self._one(context, num_parallel)
            elif not self.rules.spills or (own and context & (context - 1) == 0):
                steps, layouts = self._several(context, num_parallel, cards)
            else:
                return PlannerCell(reason="several cards are listed at powers of two and the slots of the calibration")
        except UnknownVerdictError as error:
            return PlannerCell(reason=error.message)
        return PlannerCell(
            steps=_flat(steps), layouts=_flat(layouts), evicts=self._evicts(context, num_parallel) if cards == 1 else ()
        )

    def _layout(self, offloaded: int | None, overflowing: int | None, decode: float | None) -> int:
        return self.layouts.setdefault(PlannerLayout(offloaded, overflowing, decode), len(self.layouts))

    def _answer(self, answer: PlannerAnswer) -> int:
        return self.answers.setdefault(answer, len(self.answers))

    def _evicts(self, context: int, num_parallel: int) -> tuple[int, ...]:
        other = (LoadedModel(name="another"),)

        def evicts(free: int) -> bool:
            return bool(self.rules.evicted(self.calibration, context, num_parallel, (free,), ("GPU0",), other))

        return _flat(stepped(evicts, self.rules.edges(self.calibration, context, num_parallel)))

    def _growth(self, context: int, num_parallel: int) -> int:
        """What a server comes to take beside a model in host memory, at most, bytes."""
        env = self.calibration.metadata.settings.env
        needed = predict(self.calibration, context, num_parallel)
        if not self.on_host or (found := self.rules.may_grow(self.calibration, needed, env)) is None:
            return 0
        self.uncounted = found.what
        return found.most

    def _one(self, context: int, num_parallel: int) -> _Steps:
        """On one device, or in host memory."""
        growth = self._growth(context, num_parallel)
        memory = OneMemory(self.calibration, context, num_parallel, self.rules)
        begins = [free for free, _ in stepped(memory.batch, self.rules.edges(self.calibration, context, num_parallel))]
        steps: list[tuple[int, int]] = []
        layouts: list[tuple[int, int]] = []
        for start, end in pairwise([*begins, MOST]):
            needed = memory.needed(start)
            reserve, doubt = memory.reserve(needed), needed.uncertainty_bytes
            top = needed.total_bytes + reserve
            calm = top + doubt + growth if self.on_host else 0
            edges = sorted({start, *(edge for edge in (top - doubt, top + doubt, calm) if start < edge < end)})
            enough = next((edge for edge in edges if not memory.spills(edge)[0]), end)
            for edge in edges:
                verdict: Outcome = "offload" if edge < enough else "fits"
                tight = memory.spills(edge)[1] or (verdict == "fits" and edge < calm)
                answer = PlannerAnswer(verdict, tight, needed.total_bytes, reserve, (top,), growth, calm)
                steps.append((edge, self._answer(answer)))
            if enough > start:
                layouts += self._placed(memory.placer(needed), reserve, start, enough)
            if enough < end:
                layouts.append((enough, self._whole))
        return steps, layouts

    def _placed(self, placer: Placer, reserve: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Layouts from ``low`` to before ``high`` bytes that are free."""
        if placer.layers is None or self.on_host:
            yield low, self._unknown
            return

        def number(layout: Layout | None) -> int:
            assert layout is not None and placer.layers is not None  # noqa: PT018, S101 - the layers are known
            if layout not in self._of_engine:
                placed = placed_on(placer.layers, layout)
                self._of_engine[layout] = self._layout(
                    placed.offloaded, placed.overflowing, decode_speed(self.calibration, placed)
                )
            return self._of_engine[layout]

        begins = [(budget + reserve, layout) for budget, layout in placer.layouts()]
        for (start, layout), (end, _) in pairwise([*begins, (MOST, None)]):
            first, last = int(max(start, low)), int(min(end, high))
            if first >= last:
                continue
            if layout is not None:
                yield first, number(layout)
                continue
            edges = {ceil(size) + reserve + placer.overhead for size in placer.sizes.values()}
            for begin, until in pairwise(sorted({first, *(one for one in edges if first < one < last), last})):
                for free, found in stepped(lambda free: placer.layout(free - reserve), (), begin, until):
                    yield free, number(found)

    def _several(self, context: int, num_parallel: int, cards: int) -> _Steps:
        """On several cards with the same memory free on each, or of an engine that takes the same of each."""
        kept: Kept = {}

        def judged(free: int) -> Verdict:
            return judge(self.calibration, context, num_parallel, (free,) * cards, self.rules, search=False, kept=kept)

        most = judged(MOST)
        if most.verdict == "unknown":
            raise UnknownVerdictError(most.reason or "unknown")
        needs = tuple(one.required_bytes + one.reserve_bytes for one in most.devices) or (_needed(most),)

        def value(free: int) -> tuple[PlannerAnswer, int]:
            found = judged(free)
            # What an engine leaves out when it is short differs by every byte, so what is required is that of enough memory.
            of, missing = (found, ()) if found.verdict == "fits" else (most, needs)
            answer = PlannerAnswer(found.verdict, found.tight, of.required_bytes or 0, most.reserve_bytes or 0, missing)
            if found.verdict != "fits":
                return answer, self._unknown
            return answer, self._layout(found.layers_offloaded, found.layers_overflowing, found.decode_tokens_per_s)

        sure = {_needed(most), *needs}
        sure |= {need + sign * (most.uncertainty_bytes or 0) for need in needs for sign in (-1, 1)}
        for edge in self.rules.edges(self.calibration, context, num_parallel):
            sure |= {edge, -(-edge // cards)}

        def edges() -> set[int]:
            return sure.union(*(devices.edges() for _, devices in kept.values()))

        begun = from_gib(self.calibration.metadata.placement.start_gb or 0.0)  # with that there is nothing to lay it over
        found = [step for low, high in pairwise((0, begun + 1, MOST)) for step in stepped(value, edges, low, high)]
        return [(free, self._answer(answer)) for free, (answer, _) in found], [(free, layout) for free, (_, layout) in found]


def _needed(verdict: Verdict) -> int:
    return (verdict.required_bytes or 0) + (verdict.reserve_bytes or 0)


def _flat(steps: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """One after the other; what holds already begins no step."""
    found: list[int] = []
    for free, value in steps:
        if found[-1:] != [value]:
            found += (free, value)
    return tuple(found)


def stepped(
    value: Callable[[int], Value],
    edges: Collection[int] | Callable[[], Iterable[int]],
    low: int = 0,
    high: int = MOST,
) -> Iterator[tuple[int, Value]]:
    """Where a step function of free bytes changes, from ``low`` to before ``high``, and its value from there on.

    What changes twice and is the same at the end is not seen. ``edges`` are bytes where it may change, those that are known
    by then: a search that has them takes a few questions, one without them about forty.
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
        inside = sorted(edge for edge in (edges() if callable(edges) else edges) if low < edge <= high)
        if inside and inside[0] == high and at(high - 1) == at(low):
            yield high
            return
        middle = min(inside[len(inside) // 2], high - 1) if inside else (low + high) // 2
        yield from changes(low, middle)
        yield from changes(middle, high)

    yield low, at(low)
    for free in changes(low, high - 1):
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
