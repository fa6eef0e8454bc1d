"""Which layers stay on the GPU: llama.cpp's fit, played through on a calibration's own figures.

Source: llama.cpp ``common/fit.cpp``, ``common_params_fit_impl`` (b9222 to b10488; Ollama >= 0.30 starts the same program). A
dense model keeps as many layers as fit, counted from the back, output first. A model with experts first gets the rest of every
layer, then, if all of those fit, its experts, from the front.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Final, NamedTuple

import msgspec

from harness.model.calibration import Calibration, Placement, SplitCompute
from harness.model.record import LoadRequest
from harness.prediction.layout import DevicePart, Fraction, Layout, refit, steps
from harness.prediction.memory import Prediction
from harness.prediction.rules import Rules
from harness.units import from_gib

#: Dry runs of one calibration, at most.
DRY_RUNS: Final = 10


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Layers on the GPU (the output layer is one of ``total``).

    ``overflowing`` counts as the engine does: layers on the GPU whose experts lie partly on the host. ``host_share`` is the
    share of the movable weights that lie on the host, ``host_work`` that of the bytes of weights that one token reads; 0 to 1.
    ``host_bytes`` are weights and caches that are not on the GPU.
    """

    total: int
    offloaded: int
    overflowing: int
    host_share: float
    host_work: float
    host_bytes: int = 0


class Layers(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A model at one context, bytes: per layer the weights without experts, the experts and the caches; the output part.

    ``output_last`` is how Ollama's Go runner places it: after all layers, and experts with their layers.
    """

    dense: tuple[float, ...]
    experts: tuple[float, ...]
    cache: tuple[float, ...]
    output: float
    expert_use: float
    output_last: bool = False

    @property
    def total(self) -> int:
        """Layers as the engine counts them, with the output layer."""
        return len(self.dense) + 1

    @cached_property
    def sums(self) -> tuple[tuple[float, ...], ...]:
        """Of each layer all that comes before it: weights without experts, experts, caches; the output is the last layer."""
        parts = ((*self.dense, self.output), self.experts, self.cache)
        return tuple(tuple(accumulate((*part, 0.0), initial=0.0)) for part in parts)


def layers_of(calibration: Calibration, needed: Prediction, rules: Rules) -> Layers | None:
    """The layers of a calibrated model at a context; ``None`` where their number, or their weights, are not known.

    Unknown per-layer figures are spread evenly.
    """
    placement, count = calibration.metadata.placement, calibration.metadata.model.layers
    weights = needed.weights_bytes
    if not count or weights is None:
        return None
    whole = from_gib(placement.layer_weights_gb) if placement.layer_weights_gb is not None else None
    if whole is None or whole > weights:
        whole = weights * count // (count + 1)
    dense = [float(from_gib(size)) for size in placement.layers_gb]
    experts = [float(from_gib(size)) for size in placement.experts_gb]
    if len(dense) != count:
        dense, experts = [whole / count] * count, []
    go_runner = rules.placement(calibration).go_runner
    if go_runner and experts:
        dense, experts = [one + other for one, other in zip(dense, experts, strict=True)], []
    return Layers(
        dense=tuple(dense),
        experts=tuple(experts) if len(experts) == count else (0.0,) * count,
        cache=_caches(placement.layer_kinds, count, needed),
        output=max(weights - sum(dense) - sum(experts), 0.0),
        expert_use=1.0 if placement.expert_use is None else placement.expert_use,
        output_last=go_runner,
    )


def _caches(kinds: str | None, count: int, needed: Prediction) -> tuple[float, ...]:
    """The caches of each layer: what grows is with those that attend to everything, what does not with the others."""
    known = (kinds or "").ljust(count, "-")[:count]
    growing = [kind in "fb" for kind in known]
    fixed = [kind in "wrb" for kind in known]

    def share(size: float, holders: list[bool]) -> list[float]:
        holders = holders if any(holders) else [True] * count
        return [size / sum(holders) if holds else 0.0 for holds in holders]

    parts = zip(share(needed.context_cache_bytes or 0, growing), share(needed.fixed_cache_bytes or 0, fixed), strict=True)
    return tuple(one + other for one, other in parts)


class Placer:
    """Where the layers of a model at one context go, for any budget: what a layout holds is worked out once."""

    def __init__(self, calibration: Calibration, needed: Prediction, rules: Rules) -> None:
        self.layers = layers_of(calibration, needed, rules)
        self.overhead = needed.overhead_bytes or 0
        self.sizes: dict[Layout, float] = {}
        self._placed: dict[Layout, Placed] = {}
        if self.layers is not None:
            placement, compute = calibration.metadata.placement, needed.compute_bytes or 0
            self._compute = Compute(placement, self.layers, needed.context, compute)

    def place(self, budget: int) -> Placed | None:
        """Which layers stay when the model may take ``budget`` bytes of its GPU (overhead included) and not all fit.

        ``None`` where the number of layers is not known.
        """
        layout = self.layout(budget)
        if layout is None or self.layers is None:
            return None
        if layout not in self._placed:
            self._placed[layout] = placed_on(self.layers, layout)
        return self._placed[layout]

    def layout(self, budget: int) -> Layout | None:
        """The same as the engine has it."""
        layers = self.layers
        if layers is None:
            return None
        # All experts on the host is a state that the engine tries too: only what it tried last is asked to be above the budget.
        target = budget - self.overhead
        return refit((DevicePart(layers.total),), (target,), self._held, experts=any(layers.experts))

    def layouts(self) -> Iterator[tuple[float, Layout | None]]:
        """All layouts, and the budget from which on each is taken; where it is ``None``, :meth:`layout` has to be asked."""
        if self.layers is not None:
            for target, layout in steps(self.layers.total, self._held, experts=any(self.layers.experts)):
                yield target + self.overhead, layout

    def _held(self, layout: Layout) -> list[float]:
        if layout not in self.sizes:
            assert self.layers is not None  # noqa: S101 - layout() has looked
            part, compute = layout[0], self._compute
            whole = part.layers == self.layers.total and part.partial
            work = compute.without_experts() if whole else compute.split(part.layers)
            self.sizes[layout] = sum(of_devices(self.layers, layout)[0]) + work
        return [self.sizes[layout]]


class Compute:
    """Compute buffers on the GPU for a number of layers there, at one context.

    From the grid of dry runs; without one, a split costs the cache of one layer more: what a big batch copies for a layer
    that is on the host.
    """

    def __init__(self, placement: Placement, layers: Layers, context: int, full: int) -> None:
        self.grid, self.layers, self.context, self.full = placement.split_compute, layers, context, float(full)
        self.kinds = placement.layer_kinds
        self._alike = _alike(self.grid, self.kinds, layers.total)
        self._sizes: dict[tuple[SplitCompute, ...], float] = {}

    def split(self, count: int) -> float:
        """With ``count`` layers on the GPU, the output layer among them."""
        if count >= self.layers.total:
            return self.full
        rows = self._alike[count]
        if not rows:
            return self.full + max(self.layers.cache)
        if rows not in self._sizes:
            self._sizes[rows] = interpolate(rows, self.context)
        return self._sizes[rows]

    def behind(self, start: int) -> float | None:
        """From layer ``start`` on, where what is before hands over a batch and no cache; ``None`` where no dry run was so."""
        wanted = host_class(self.kinds, self.layers.total, self.layers.total - start)
        counts = [row.layers for row in self.grid if not row.experts_on_host and row.layers < self.layers.total]
        like = (one for one in counts if host_class(self.kinds, self.layers.total, one) == (False, *wanted[1:]))
        return None if (count := next(like, None)) is None else self.split(count)

    def without_experts(self) -> float:
        """With every layer on the GPU, and experts of some on the host."""
        rows = [row for row in self.grid if row.experts_on_host]
        return interpolate(rows, self.context) if rows else self.full


#: How alike two splits are (:func:`host_class`): the same, but for what is further off on the host, but for the device.
_LIKE: Final = (itemgetter(0, 1, 2), itemgetter(0, 2), itemgetter(0, 1))


@lru_cache
def _alike(grid: tuple[SplitCompute, ...], kinds: str | None, total: int) -> tuple[tuple[SplitCompute, ...], ...]:
    """For each number of layers on the GPU below ``total``, the dry runs that are the most like it."""
    every = [row for row in grid if not row.experts_on_host]
    one_off = [row for row in every if row.layers == total - 1]
    others = [row for row in every if row not in one_off] or every
    found = []
    for count in range(total):
        wanted = host_class(kinds, total, count)
        rows = one_off if one_off and count == total - 1 else others
        classes = [host_class(kinds, total, row.layers) for row in rows]
        like = ([row for row, one in zip(rows, classes, strict=True) if pick(one) == pick(wanted)] for pick in _LIKE)
        alike = next(filter(None, like), rows)
        contexts = Counter(row.layers for row in alike)  # one context alone tells no line: that of the first dry run
        nearest = min(contexts, key=lambda layers: (contexts[layers] == 1, abs(layers - count)), default=0)
        found.append(tuple(row for row in alike if row.layers == nearest))
    return tuple(found)


def host_class(kinds: str | None, total: int, count: int) -> tuple[bool, bool, bool]:
    """What decides compute beside the number of layers.

    Whether the last layer on the host attends, and whether any there attends to everything (llama.cpp b10434: 390 or 163 MiB
    for the same hybrid model as one more layer goes); whether the first one on the device is recurrent (b11434: 39 or 41 MiB).
    """
    letters, on_host = kinds or "f" * total, max(total - count, 0)
    host = letters[:on_host]
    return host[-1:] in ("f", "w", "b"), any(kind in "fb" for kind in host), letters[on_host : on_host + 1] == "r"


def interpolate(rows: Sequence[SplitCompute], context: int) -> float:
    """Compute at a context, bytes, by straight lines between the contexts of dry runs; nowhere below the smallest of them."""
    points = sorted((row.context, float(from_gib(row.compute_gb))) for row in rows)
    if len(points) == 1:
        return points[0][1]
    left, right = points[-2:]
    for index in range(1, len(points)):
        if context <= points[index][0]:
            left, right = points[index - 1 : index + 1]
            break
    value = left[1] + (right[1] - left[1]) * (context - left[0]) / (right[0] - left[0])
    return max(value, min(size for _, size in points) if context < points[0][0] else 0.0)


class OnDevice(NamedTuple):
    """Bytes of a model on one device: weights without experts, experts, caches."""

    dense: float
    experts: float
    cache: float


#: What of a layer's experts stays with it: gate, up and down are a third each.
_KEPT: Final[dict[Fraction, float]] = {"dense": 0.0, "attention": 0.0, "up": 1 / 3, "gate": 2 / 3}


def of_devices(layers: Layers, layout: Layout) -> list[OnDevice]:
    """Weights and caches of each device under a layout.

    A partial layer's experts lie on the host, but what the first partial layer of a device gives away is on the next device.
    """
    total = layers.total
    offloaded = sum(part.layers for part in layout)
    dense, experts, cache = layers.sums
    first = total - offloaded
    if layers.output_last and 0 < offloaded < total:
        first -= 1  # the output part, which would be the last of them, stays on the host
    found, passed_on = [], 0.0
    for part in layout:
        whole, end = first + part.full, first + part.layers
        kept = passed_on
        passed_on = 0.0
        if part.partial and part.fraction != "dense":
            size = experts[whole + 1] - experts[whole]
            kept += _KEPT[part.fraction] * size
            passed_on = (1 - _KEPT[part.fraction]) * size
        found.append(OnDevice(dense[end] - dense[first], experts[whole] - experts[first] + kept, cache[end] - cache[first]))
        first = end
    return found


def placed_on(layers: Layers, layout: Layout) -> Placed:
    """What a layout leaves to the host, all devices together."""
    parts = of_devices(layers, layout)
    dense, experts = sum(part.dense for part in parts), sum(part.experts for part in parts)
    all_dense, all_experts, all_caches = (part[-1] for part in layers.sums)
    work = all_dense + all_experts * layers.expert_use
    done = dense + experts * layers.expert_use
    return Placed(
        total=layers.total,
        offloaded=sum(part.layers for part in layout),
        overflowing=min(sum(part.partial for part in layout), len(layers.dense)),
        host_share=_share(all_dense + all_experts - dense - experts, all_dense + all_experts),
        host_work=_share(work - done, work),
        host_bytes=max(round(all_dense + all_experts + all_caches - sum(map(sum, parts))), 0),
    )


def _share(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole else 0.0


def plan_dry_runs(
    kinds: str | None, layers: int, contexts: Sequence[int], *, moe: bool, num_batch: int | None = None
) -> tuple[LoadRequest, ...]:
    """The dry runs that tell what compute costs when layers are split off: at most :data:`DRY_RUNS`.

    ``layers`` without the output layer; ``contexts`` in ascending order. The three most frequent classes of splits
    (:func:`host_class`) at three contexts; with one class, its second run is the split of a single layer. With experts, all
    layers without them take the place of every second context.
    """
    total = layers + 1
    counts: dict[tuple[bool, bool, bool], list[int]] = {}
    for count in range(2, total - 1):
        counts.setdefault(host_class(kinds, total, count), []).append(count)
    classes = sorted(counts.values(), key=len, reverse=True)[:3]
    wanted = [members[len(members) // 2] for members in classes]
    if len(wanted) < 2 and total > 1:
        wanted.append(total - 1)
    low, top = contexts[0], contexts[-1]
    middle = contexts[len(contexts) // 2]

    def asked(context: int, count: int, *, experts_on_host: bool = False) -> LoadRequest:
        return LoadRequest(
            context=context, num_batch=num_batch, purpose="dry-run", gpu_layers=count, experts_on_host=experts_on_host
        )

    first = [asked(context, wanted[0]) for context in dict.fromkeys((low, middle, top))]
    if moe:
        rest = [asked(context, total, experts_on_host=True) for context in dict.fromkeys((low, top))]
        last = [asked(top, one) for one in wanted[1:2]]
    else:
        rest = [asked(context, one) for one in wanted[1:] for context in dict.fromkeys((low, middle, top))]
        last = []
    return tuple([*first, *rest, *last][:DRY_RUNS])
