"""Which models stay loaded together on which device: branch and bound over calibrated lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from harness.model.calibration import Calibration
from harness.prediction.forced import NOTHING, Forced
from harness.prediction.host import HostMemory
from harness.prediction.rules import LoadedModel, Rules
from harness.prediction.together import Fate, judge_together
from harness.prediction.verdict import Verdict
from harness.units import CELL_PADDING

#: Sets of one number of models that are judged in vain before smaller ones are tried, and sets whose sizes are added up.
JUDGED: Final = 40
_ADDED: Final = 200_000


class PackedModel(NamedTuple):
    """A model to be put beside others: slots and context as asked, ``required_bytes`` and reserve at that context."""

    calibration: Calibration
    context: int
    num_parallel: int
    rules: Rules
    required_bytes: int
    reserve_bytes: int


class Packing(NamedTuple):
    """Models that stay loaded together. ``members`` are positions, in the order in which they are started.

    ``largest_context``: up to so many tokens a slot all of them stay, each to the end of its own range.
    """

    members: tuple[int, ...]
    verdicts: tuple[Verdict, ...]
    largest_context: int


class Packings(NamedTuple):
    """What was found. ``limits`` are the engine and the step by which it ended models in sets with room enough, with figures.

    The step ``host-memory``: the host could not hold the parts that are there.
    ``complete`` is false where there are more sets than were tried or shown.
    """

    found: tuple[Packing, ...]
    limits: tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]
    complete: bool


def pack(
    models: Sequence[PackedModel],
    available: tuple[int, ...],
    *,
    preferred: Sequence[int] = (),
    names: tuple[str, ...] | None = None,
    forced: Forced = NOTHING,
    shown: int = 6,
    loaded: Sequence[tuple[Rules, LoadedModel]] = (),
    host: HostMemory = HostMemory(),  # noqa: B008 - frozen
) -> Packings:
    """The largest sets of two models and more that stay loaded together; those with all ``preferred`` models come first.

    ``loaded`` are models that run already, ``host`` is memory beside GPUs, as for
    :func:`harness.prediction.together.judge_together`. A set is started with its largest model: an engine that goes by an
    estimate of its own ends fewer then.
    """
    search = _Search(models, available, names, forced, loaded, host)
    found: list[tuple[int, ...]] = []
    complete = True
    for kept in range(len(preferred), -1, -1):
        must = frozenset(preferred[:kept])
        for count in range(search.most(), max(len(must), 2) - 1, -1):
            vain = 0
            for members in search.sets(count, must):
                if len(found) >= shown or vain >= JUDGED:
                    complete = False
                    break
                if not any(set(members) <= set(larger) for larger in found):
                    stays = search.stays(members)
                    vain += not stays
                    found += [members] * stays
    complete = complete and search.added < _ADDED
    return Packings(tuple(search.packing(one) for one in found), tuple(search.limits), complete)


class _Search:
    def __init__(
        self,
        models: Sequence[PackedModel],
        available: tuple[int, ...],
        names: tuple[str, ...] | None,
        forced: Forced,
        loaded: Sequence[tuple[Rules, LoadedModel]],
        host: HostMemory,
    ) -> None:
        self.loaded, self.host = loaded, host
        self.room = sum(available) + sum(size for _, one in loaded for size in one.on_devices.values())
        self.models, self.available, self.names, self.forced = models, available, names, forced
        self.order = sorted(range(len(models)), key=lambda one: models[one].required_bytes)
        self.added = 0
        self.limits: dict[tuple[str, str, tuple[tuple[str, int], ...]], None] = {}

    def most(self) -> int:
        """So many models have room at most: the smallest ones, within what each engine keeps loaded."""
        total = self.room
        least = min((model.reserve_bytes for model in self.models), default=0)
        sizes = accumulate(self.models[one].required_bytes for one in self.order)
        count = sum(size + least <= total for size in sizes)
        limits = {model.rules.title: model.rules.most_loaded(model.calibration, len(self.available)) for model in self.models}
        known = {title: limit for title, limit in limits.items() if limit is not None}
        if len(known) < len(limits) or not known or max(known.values()) >= count:
            return count
        for title, limit in known.items():
            self.limits[title, "evict-limit", (("limit", limit),)] = None
        return max(known.values())

    def sets(self, count: int, must: frozenset[int]) -> Iterator[tuple[int, ...]]:
        """Sets of so many models, the smallest first, whose sizes may have room; the largest model of each comes first."""
        total, size = self.room, [self.models[one].required_bytes for one in self.order]
        reserve = [self.models[one].reserve_bytes for one in self.order]
        sums = [0, *accumulate(size)]

        def grow(chosen: tuple[int, ...], start: int, held: int, kept: int) -> Iterator[tuple[int, ...]]:
            missing = count - len(chosen)
            if not missing:
                yield chosen
                return
            for place in range(start, len(size) - missing + 1):
                self.added += 1
                if held + sums[place + missing] - sums[place] + kept > total or self.added > _ADDED:
                    return  # the smallest that are left are too large together
                if held + size[place] + max(kept, reserve[place]) <= total:
                    yield from grow((*chosen, place), place + 1, held + size[place], max(kept, reserve[place]))

        for chosen in grow((), 0, 0, 0):
            members = tuple(self.order[place] for place in reversed(chosen))
            if must <= set(members):
                yield members

    def stays(self, members: Sequence[int], context: int | None = None) -> bool:
        """Whether none of them is ended or offloaded; with another context, at that one."""
        return all(fate == "resident" for fate in self.started(members, context)[1])

    def started(self, members: Sequence[int], context: int | None = None) -> tuple[list[Verdict], list[Fate | None]]:
        requests = []
        for one in members:
            model = self.models[one]
            top = model.calibration.metadata.quality.valid_to
            asked = model.context if context is None else min(context, top)
            requests.append((model.calibration, asked, model.num_parallel, model.rules))
        verdicts, fates = judge_together(
            requests, self.available, forced=self.forced, names=self.names, search=False, loaded=self.loaded, host=self.host
        )
        if context is None:
            for one, verdict in zip(members, verdicts, strict=True):
                if verdict.host_short_bytes and not verdict.short_bytes:
                    self.limits[self.models[one].rules.title, "host-memory", ()] = None
        if context is None and "offload" not in fates:
            for one, verdict in zip(members, verdicts, strict=True):
                for reason in verdict.reasons:
                    if reason.step.startswith("evict-") and "evicted" in fates:
                        kept = {name: value for name, value in reason.figures.items() if name in ("limit", "percent")}
                        self.limits[self.models[one].rules.title, reason.step, tuple(sorted(kept.items()))] = None
        return verdicts, fates

    def packing(self, members: tuple[int, ...]) -> Packing:
        """A set with how far the contexts of all its models go."""
        verdicts, _ = self.started(members)
        tops = [self.models[one].calibration.metadata.quality.valid_to for one in members]
        low, high = min(self.models[one].context for one in members) // CELL_PADDING, max(tops) // CELL_PADDING
        if self.stays(members, high * CELL_PADDING):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.stays(members, middle * CELL_PADDING) else (low, middle)
        return Packing(members, tuple(verdicts), low * CELL_PADDING)
