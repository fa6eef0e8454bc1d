"""The settings that make the most of a budget, and what would make a model fit that does not.

Every combination of settings that are known (:mod:`harness.prediction.candidates`) with slots, the card, and the layers or
experts that the engine leaves on the host is judged as ``check`` judges it. Changes are ordered by what they cost: a card that
is pinned costs nothing, a smaller batch slows down prompts, a quantised cache changes what the model answers, fewer slots and
shorter contexts are less service, and layers on the host cost most of the speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.model.kv_types import VALUE_BYTES
from harness.prediction.candidates import Candidate, candidates
from harness.prediction.host import HostMemory, with_host
from harness.prediction.memory import decode_at_depth, predict
from harness.prediction.rules import Rules
from harness.prediction.settings import AskedSettings, derive
from harness.prediction.verdict import Source, Verdict, judge, largest_context, named
from harness.units import format_size

#: Where nothing says which context is wanted and none fits, tokens per slot.
USUAL_CONTEXT: Final = 4096


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What settings have to reach: tokens per slot, tokens per second, slots; ``None``: as much as there is."""

    context: int | None = None
    tokens_per_s: float | None = None
    num_parallel: int = 1


class SettingChange(msgspec.Struct, frozen=True, kw_only=True):
    """One setting that is another than without tuning, as text; ``saves_bytes`` is what it saves at the wanted context."""

    setting: str
    value: str
    instead_of: str
    saves_bytes: int | None = None


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Settings, and what follows from them; bytes, tokens per slot, tokens per second.

    ``calibration`` is the key of the file that answers. ``num_batch`` and ``gpu_layers`` are ``None`` where the engine chooses;
    ``cards`` are empty where it uses what it finds. ``decode_tokens_per_s`` is with the context full where that was measured,
    ``None`` where these settings were not timed. ``meets`` says whether the demand is reached, ``misses`` why not.
    """

    calibration: str
    source: Source
    derived: tuple[str, ...]
    context: int
    num_parallel: int
    kv_cache_type: str
    flash_attention: str | None
    num_batch: int | None
    cards: tuple[str, ...]
    gpu_layers: int | None
    layers_total: int | None
    layers_overflowing: int | None
    verdict: str
    required_bytes: int | None
    reserve_bytes: int | None
    available_bytes: int | None
    margin_bytes: int | None
    uncertainty_bytes: int | None
    tight: bool
    host_required_bytes: int | None
    host_short_bytes: int | None
    host_growth_bytes: int | None
    decode_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    changes: tuple[SettingChange, ...]
    meets: bool
    misses: str | None = None


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """Choices in the order of their cost; the first that meets the demand is ``best``.

    ``context`` is what was asked for, or what fits without a change. ``least_bytes`` is the least that any settings with
    everything on the target need there, with what the engine keeps free and the uncertainty. ``short_bytes`` is what is missing
    for it without a change (0: it fits), ``usual_tokens_per_s`` the decode speed without a change and everything on the target.
    """

    context: int
    demand: Demand
    choices: tuple[Choice, ...]
    least_bytes: int | None
    short_bytes: int | None
    usual_tokens_per_s: float | None
    available: tuple[int, ...]

    @property
    def best(self) -> Choice | None:
        """The cheapest choice that meets the demand."""
        return next((one for one in self.choices if one.meets), None)


class _Cost(NamedTuple):
    """What a choice costs, the dearest first; all zero is what happens without tuning."""

    host: float
    context: int
    slots: int
    cache: float
    batch: int
    card: int


def tune(
    files: Sequence[tuple[str, Calibration]],
    available: tuple[int, ...],
    demand: Demand,
    rules: Rules,
    *,
    names: tuple[str, ...] | None = None,
    asked: AskedSettings | None = None,
    host: HostMemory = HostMemory(),  # noqa: B008 - frozen
) -> Tuning:
    """The choices for one model on a budget, the cheapest first.

    Args:
        files: key and calibration of each file that holds here: of the same weights, engine, version and devices. The first
            is the one that answers without tuning.
        available: free bytes of each device.
        demand: what has to be reached.
        rules: the engine's.
        names: of the devices.
        asked: settings that are given and stay.
        host: memory beside the devices; where it is not known, it is not asked for.

    Raises:
        UnknownVerdictError: nothing can be said of any of them, with the reason of the first.
    """
    found = list(candidates(files, asked or AskedSettings(), rules))
    if not found:
        raise UnknownVerdictError("no calibration here has the settings that are given", code="no-such-settings")
    first = found[0]
    wanted = demand.context or largest_context(first.calibration, demand.num_parallel, available, rules)
    context = wanted or min(USUAL_CONTEXT, first.calibration.metadata.quality.valid_to)
    search = _Search(first, context, demand, available, names, rules, host)
    pairs = [pair for one in found for pair in search.of(one)]
    if not pairs and search.unknown is not None:
        raise UnknownVerdictError(search.unknown)
    pairs.sort(key=lambda pair: (not pair[1].meets, pair[0], -pair[1].context))
    kept: list[tuple[_Cost, Choice]] = []
    for cost, choice in pairs:
        if not any(_dominates(other, better, cost, choice) for other, better in kept):
            kept.append((cost, choice))
    return Tuning(
        context=context,
        demand=demand,
        choices=tuple(choice for _, choice in kept),
        least_bytes=search.least,
        short_bytes=search.short(),
        usual_tokens_per_s=first.calibration.metadata.performance.decode_tokens_per_s,
        available=available,
    )


def _dominates(cost: _Cost, choice: Choice, other: _Cost, worse: Choice) -> bool:
    """Whether nothing speaks for the second of two choices."""
    reaches = choice.context >= worse.context and choice.num_parallel >= worse.num_parallel and choice.meets >= worse.meets
    return reaches and all(one <= two for one, two in zip(cost, other, strict=True))


class _Search:
    """Judges candidates at one demand."""

    def __init__(
        self,
        first: Candidate,
        context: int,
        demand: Demand,
        available: tuple[int, ...],
        names: tuple[str, ...] | None,
        rules: Rules,
        host: HostMemory,
    ) -> None:
        self.host, self.env = host, host.environments.get(rules.name)
        self.first, self.context, self.demand = first, context, demand
        self.available, self.names, self.rules = available, named(available, names), rules
        self.least: int | None = None
        self.unknown: str | None = None

    def of(self, one: Candidate) -> Iterator[tuple[_Cost, Choice]]:
        """Everything on the target: on each card, with as many slots; and for the first, what the engine leaves on the host."""
        slots = self.demand.num_parallel
        for cards in self._card_sets(one.calibration):
            free = tuple(self.available[card] for card in cards)
            names = tuple(self.names[card] for card in cards)
            for count in dict.fromkeys((slots, *(1 << power for power in range((slots - 1).bit_length())))):
                yield from self._whole(one, cards, free, names, count)
            yield from self._partly(one, cards, free, names)

    def _card_sets(self, calibration: Calibration) -> list[tuple[int, ...]]:
        every = tuple(range(len(self.available)))
        if len(every) < 2 or calibration.metadata.machine.target == "host" or not self.rules.spills:
            return [every]
        singles = {self.available[card]: (card,) for card in reversed(every)}  # of equal cards the first
        return [every, *singles.values()]

    def _whole(
        self, one: Candidate, cards: tuple[int, ...], free: tuple[int, ...], names: tuple[str, ...], slots: int
    ) -> Iterator[tuple[_Cost, Choice]]:
        if not self._answers(one, slots):
            return
        try:
            most = largest_context(one.calibration, slots, free, self.rules)
            if slots == self.demand.num_parallel:
                self._lower(one, slots)
        except UnknownVerdictError as error:
            self.unknown = self.unknown or error.message
            return
        if not most:
            return
        verdict = judge(one.calibration, most, slots, free, self.rules, names=names, env=self.env)
        if verdict.verdict != "fits":
            self.unknown = self.unknown or verdict.reason
            return
        speed = decode_at_depth(one.calibration, most) or verdict.decode_tokens_per_s
        yield self._choice(one, cards, verdict, speed)

    def _answers(self, one: Candidate, slots: int) -> bool:
        """Whether the calibration says anything of so many slots: not of other ones that share one cache."""
        asked = AskedSettings(num_parallel=slots)
        obstacles = derive(one.calibration, asked, ggml_caches=self.rules.ggml_caches).obstacles
        self.unknown = self.unknown or (f"calibrated with {' and '.join(obstacles)}" if obstacles else None)
        return not obstacles

    def short(self) -> int | None:
        """What is missing without a change, so that it fits for certain; ``None`` where that is not known."""
        try:
            verdict = judge(self.first.calibration, self.context, self.demand.num_parallel, self.available, self.rules)
        except UnknownVerdictError:
            return None
        if verdict.verdict == "unknown" or verdict.short_bytes is None:
            return None
        return 0 if verdict.verdict == "fits" else verdict.short_bytes + (verdict.uncertainty_bytes or 0)

    def _lower(self, one: Candidate, slots: int) -> None:
        """Remember the least that is needed at the wanted context."""
        if self.context <= one.calibration.metadata.quality.valid_to:
            needed = predict(one.calibration, self.context, slots)
            reserve = self.rules.placement(one.calibration).reserve_of(needed.overhead_bytes)
            size = needed.total_bytes + needed.uncertainty_bytes + reserve
            self.least = size if self.least is None else min(self.least, size)

    def _partly(
        self, one: Candidate, cards: tuple[int, ...], free: tuple[int, ...], names: tuple[str, ...]
    ) -> Iterator[tuple[_Cost, Choice]]:
        """What the engine leaves on the host at the wanted context, where it does not fit."""
        on_host = one.calibration.metadata.machine.target == "host"
        if on_host or not self.rules.spills or not self._answers(one, self.demand.num_parallel):
            return
        try:
            verdict = judge(
                one.calibration, self.context, self.demand.num_parallel, free, self.rules, names=names, env=self.env
            )  # fmt: skip
        except UnknownVerdictError:
            return
        if verdict.verdict == "offload" and verdict.layers_offloaded is not None:
            yield self._choice(one, cards, verdict, verdict.decode_tokens_per_s)

    def _choice(self, one: Candidate, cards: tuple[int, ...], verdict: Verdict, speed: float | None) -> tuple[_Cost, Choice]:
        demand, settings = self.demand, one.calibration.metadata.settings
        whole = verdict.verdict == "fits"
        host = with_host(verdict, self.host.available)  # a choice that lacks host memory does not meet the demand
        pinned = () if len(cards) == len(self.available) else tuple(device.name for device in verdict.devices)
        misses = None
        if verdict.num_parallel < demand.num_parallel:
            misses = f"{verdict.num_parallel} of {demand.num_parallel} slots"
        elif verdict.context < (demand.context or 1):
            misses = f"{verdict.context:,} of {demand.context:,} tokens"
        elif demand.tokens_per_s is not None and speed is None:
            misses = "its speed was not measured"
        elif demand.tokens_per_s is not None and speed is not None and speed < demand.tokens_per_s:
            misses = f"{speed:.1f} of {demand.tokens_per_s:g} tokens/s"
        elif host.host_short_bytes:
            misses = f"{format_size(host.host_short_bytes, 1)} of host memory"
        elif not whole and demand.tokens_per_s is None:
            misses = "layers on the host"
        cost = _Cost(
            host=0.0 if whole else 1.0 + _lost(speed, one.calibration),
            context=max((demand.context or self.context) - verdict.context, 0),
            slots=demand.num_parallel - verdict.num_parallel,
            cache=max(_size(self.first.cache) - _size(one.cache), 0.0),
            batch=0 if one.batch == self.first.batch else _LARGEST_BATCH - (one.batch or 0),
            card=len(pinned),
        )
        performance = one.calibration.metadata.performance
        return cost, Choice(
            calibration=one.key,
            source="derived" if one.derived else verdict.source,
            derived=one.derived,
            context=verdict.context,
            num_parallel=verdict.num_parallel,
            kv_cache_type=one.cache,
            flash_attention=settings.flash_attention,
            num_batch=one.batch,
            cards=pinned,
            gpu_layers=None if whole else verdict.layers_offloaded,
            layers_total=verdict.layers_total,
            layers_overflowing=verdict.layers_overflowing,
            verdict=host.verdict,
            required_bytes=verdict.required_bytes,
            reserve_bytes=verdict.reserve_bytes,
            available_bytes=verdict.available_bytes,
            margin_bytes=verdict.margin_bytes,
            uncertainty_bytes=verdict.uncertainty_bytes,
            tight=host.tight,
            host_required_bytes=host.host_required_bytes,
            host_short_bytes=host.host_short_bytes,
            host_growth_bytes=host.host_growth_bytes,
            decode_tokens_per_s=speed,
            prompt_tokens_per_s=performance.prompt_tokens_per_s if whole and not one.derived and not cost.batch else None,
            changes=tuple(self._changes(one, pinned, verdict)),
            meets=misses is None,
            misses=misses,
        )

    def _changes(self, one: Candidate, pinned: tuple[str, ...], verdict: Verdict) -> Iterator[SettingChange]:
        """What is set otherwise than without tuning, the cheapest first."""
        if pinned:
            yield SettingChange(setting="card", value=" + ".join(pinned), instead_of="all cards")
        if one.batch != self.first.batch:
            own = "the engine's own" if self.first.batch is None else str(self.first.batch)
            before = self.first.calibration if one.cache == self.first.cache else None
            saved = self._saved(before, one.calibration)
            yield SettingChange(setting="batch", value=str(one.batch or "the engine's own"), instead_of=own, saves_bytes=saved)
        if one.cache != self.first.cache:
            before = self.first.calibration if one.batch == self.first.batch else None
            yield SettingChange(
                setting="kv-cache",
                value=one.cache,
                instead_of=self.first.cache,
                saves_bytes=self._saved(before, one.calibration),
            )
        slots = self.demand.num_parallel
        if verdict.num_parallel != slots:
            saved = self._need(one.calibration, slots) - self._need(one.calibration, verdict.num_parallel)
            yield SettingChange(setting="slots", value=str(verdict.num_parallel), instead_of=str(slots), saves_bytes=saved)
        if verdict.context < (self.demand.context or self.context):
            yield SettingChange(
                setting="context", value=f"{verdict.context:,}", instead_of=f"{self.demand.context or self.context:,}"
            )
        if verdict.verdict == "offload":
            value = f"{verdict.layers_offloaded} of {verdict.layers_total} layers on the GPU"
            if verdict.layers_overflowing:
                value += f", {verdict.layers_overflowing} of them with experts on the host"
            yield SettingChange(setting="layers", value=value, instead_of="all")

    def _need(self, calibration: Calibration, slots: int) -> int:
        return predict(calibration, self.context, slots).total_bytes

    def _saved(self, before: Calibration | None, after: Calibration) -> int | None:
        if before is None:
            return None
        return self._need(before, self.demand.num_parallel) - self._need(after, self.demand.num_parallel)


#: Larger than any physical batch.
_LARGEST_BATCH: Final = 1 << 20


def _size(cache: str) -> float:
    return VALUE_BYTES.get(cache, VALUE_BYTES["f16"])


def _lost(speed: float | None, calibration: Calibration) -> float:
    """The share of the decode speed that is lost, 1 where it is not known."""
    fast = calibration.metadata.performance.decode_tokens_per_s
    return 1.0 if not speed or not fast else max(1.0 - speed / fast, 0.0)
