"""What each of several devices holds of a model, and whether every one of them has the room.

llama.cpp tests each device against its own margin (``common/fit.cpp``): the sum proves nothing. From a calibration on one
device follow weights and caches of every layer, and compute buffers by a law with its bound
(:func:`harness.prediction.device_compute.by_law`); a calibration on as many devices has them from dry runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import ceil
from typing import Final

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.device_compute import COPIES, DeviceCompute, OneDevice, by_law
from harness.prediction.layout import Layout, default_split, fit, pipelined, refit
from harness.prediction.memory import Prediction
from harness.prediction.placement import Compute, Layers, Placed, layers_of, of_devices, placed_on
from harness.prediction.rules import Rules, Spread
from harness.units import MIB, TOKENS_PER_UNIT, format_size, from_gib, pad_cells

#: A share of the weights that is none.
_NOTHING: Final = 1e-9


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One device; bytes. ``layers`` is what the engine puts there, ``None`` where it is not known; the output is a layer."""

    name: str
    required_bytes: int
    reserve_bytes: int
    available_bytes: int
    short_bytes: int
    layers: int | None


class Arranged(msgspec.Struct, frozen=True, kw_only=True):
    """A model over devices. ``uncertainty_bytes`` is that of the device where it is largest; ``tight``: it may fit or not.

    ``derived``: compute buffers follow from the law, or from dry runs of other splits. ``below_margin``: devices that will keep
    less free than the engine means to, with every layer on devices all the same.
    """

    fits: bool
    tight: bool
    devices: tuple[DeviceVerdict, ...]
    placed: Placed
    margin_bytes: int
    uncertainty_bytes: int
    derived: bool
    below_margin: tuple[str, ...] = ()

    def notes(self, title: str, measured_on: int) -> tuple[str, ...]:
        """What to say of it beside the figures; ``title`` is the engine's."""
        notes = []
        if self.derived:
            one = "one device" if measured_on == 1 else f"{measured_on} devices"
            bound = f"good to {format_size(self.uncertainty_bytes)} a device"
            notes.append(f"derived: compute buffers of {len(self.devices)} devices are calculated from {one}, {bound}")
        if self.below_margin:
            left = min(one.reserve_bytes for one in self.devices)
            keep = f"{' and '.join(self.below_margin)} {'keep' if len(self.below_margin) > 1 else 'keeps'}"
            notes.append(
                f"{title} looks at one device at a time: every layer is on one, but {keep} less free than the margin, "
                f"{format_size(left)} at least"
            )
        return tuple(notes)


class _Held:
    """What each device holds under a layout: weights, caches and compute, and by how much each may be off; bytes."""

    def __init__(self, calibration: Calibration, needed: Prediction, layers: Layers) -> None:
        placement, settings = calibration.metadata.placement, calibration.metadata.settings
        self.layers, self.needed = layers, needed
        self.kinds = (placement.layer_kinds or "f" * len(layers.dense)).ljust(len(layers.dense), "-")
        batch, cells = needed.num_batch or settings.num_batch or 512, pad_cells(needed.context)
        # Dry runs were made with the calibration's own batch and slots; with others only the law is left.
        same = needed.num_parallel == settings.num_parallel and batch == (settings.num_batch or 512)
        rows = placement.set_compute if same else ()
        self.known = DeviceCompute(rows, self.kinds, cells, moe=any(layers.experts))
        measured_on, total = max(len(calibration.metadata.machine.gpus), 1), float(needed.compute_bytes or 0)
        band = calibration.band_for(needed.context, needed.num_batch, needed.num_parallel)
        growing = min(from_gib(band.compute_gb_per_10k) * cells / TOKENS_PER_UNIT, total)
        row = batch * (4 if settings.flash_attention == "disabled" else 2)
        hidden = None if placement.width is None else 4.0 * placement.width * batch
        if measured_on > 1:  # copies and all, shared by its devices
            constant, mask = (total - growing) / measured_on, growing / measured_on / COPIES
            self.one = OneDevice(constant + mask, mask, mask, 0.0, 0.0)
        else:
            self.one = OneDevice(total, growing, row * cells, row * _window_cells(self.kinds, needed), hidden)
        self.compute = Compute(placement, layers, needed.context, round(self.one.full))
        self.remote = bool(settings.env.get("LLAMA_ARG_RPC"))
        self.one_layer = 0.0 if placement.layers_gb else max(layers.dense)
        self._cache: dict[Layout, tuple[list[float], list[float], bool]] = {}
        self._new: list[tuple[list[float], list[float], bool]] = []

    def held(self, layout: Layout) -> list[float]:
        """Bytes of each device, as predicted."""
        return self._of(layout)[0]

    def doubts(self, layout: Layout) -> list[float]:
        """By how much each of them may be off."""
        return self._of(layout)[1]

    def derived(self, layout: Layout) -> bool:
        """Whether compute is calculated from another set of devices."""
        return self._of(layout)[2]

    def at(self, layout: Layout, times: float) -> list[float]:
        """Bytes of each device with so many times what it may be off."""
        sizes, doubts, _ = self._of(layout)
        return [max(size + times * doubt, 0.0) for size, doubt in zip(sizes, doubts, strict=True)]

    def new_sizes(self) -> Iterator[float]:
        """Bytes that a layout puts on a device and the ends of the interval; of layouts new since the last time."""
        new, self._new = self._new, []
        for sizes, doubts, _ in new:
            for size, doubt in zip(sizes, doubts, strict=True):
                yield from (size - doubt, size, size + doubt)

    def _of(self, layout: Layout) -> tuple[list[float], list[float], bool]:
        if (found := self._cache.get(layout)) is not None:
            return found
        parts = [sum(one) for one in of_devices(self.layers, layout)]
        if (known := self.known.of(layout)) is not None:
            sizes = [part + compute for part, (compute, _) in zip(parts, known, strict=True)]
            compute_doubts = [MIB / 2 + less for _, less in known]
        else:
            offloaded = sum(part.layers for part in layout)
            begin = self.compute.split(offloaded) if offloaded < self.layers.total else self.compute.without_experts()
            law = by_law(self.kinds, layout, self.one, begin, self.compute.behind if self.remote else None)
            sizes = [part + compute for part, (compute, _) in zip(parts, law, strict=True)]
            compute_doubts = [less for _, less in law]
        share = self.needed.uncertainty_bytes / max(self.needed.total_bytes, 1)
        doubts = [share * size + doubt + self.one_layer for size, doubt in zip(sizes, compute_doubts, strict=True)]
        self._cache[layout] = found = sizes, doubts, known is None
        self._new.append(found)
        return found


def _window_cells(kinds: str, needed: Prediction) -> float:
    """Cells of the cache of a sliding window: its layers' caches in parts of those that grow, at most the context's."""
    cells, windows, full = pad_cells(needed.context), kinds.count("w"), sum(kind in "fb" for kind in kinds)
    per_cell = (needed.context_cache_bytes or 0) / full / cells if full else 0.0
    fixed = (needed.fixed_cache_bytes or 0) / windows if windows else 0.0
    return min(fixed / per_cell, cells) if per_cell else float(cells) * bool(windows)


class Devices:
    """A calibrated model at one context over several devices, asked for any amounts that are free: a layout is sized once.

    Args:
        calibration: made on one device or more.
        needed: its prediction, in the batch that the engine will take.
        rules: the engine's.

    Raises:
        UnknownVerdictError: the layers are not known.
    """

    def __init__(self, calibration: Calibration, needed: Prediction, rules: Rules) -> None:
        layers = layers_of(calibration, needed, rules)
        if layers is None or needed.compute_bytes is None or layers.output_last:
            raise UnknownVerdictError("the size of each layer is unknown, so the share of each device is unknown too")
        self.layers, self.moe = layers, any(layers.experts)
        # The driver's part is shared out evenly: NVML says what a process holds of each card, but not which of them the
        # engine's log calls CUDA0 (the fastest first, unless CUDA_DEVICE_ORDER is PCI_BUS_ID).
        self.overhead = (needed.overhead_bytes or 0) / max(len(calibration.metadata.machine.gpus), 1)
        self.memory = _Held(calibration, needed, layers)
        self.reserve = rules.placement(calibration).reserve_of(round(self.overhead))
        self.begun = from_gib(calibration.metadata.placement.start_gb or 0.0)

        self._edges: set[int] = set()

    def edges(self) -> set[int]:
        """Free bytes of a device with the usual margin at which one of the layouts that were looked at begins to fit."""
        besides = (self.overhead, self.overhead + self.reserve)
        self._edges.update(ceil(size + beside) for size in self.memory.new_sizes() for beside in besides)
        return self._edges


def arrange(held: Devices, spread: Spread, available: Sequence[int], names: Sequence[str]) -> Arranged:
    """Lay a model over the devices that ``spread`` names, as the engine does.

    Args:
        held: the model.
        spread: which devices, and how.
        available: free bytes of each device of ``spread``, in its order.
        names: of the same devices.

    Raises:
        UnknownVerdictError: no device has any memory.
    """
    layers, memory, moe, overhead = held.layers, held.memory, held.moe, held.overhead
    reserves = spread.reserves or (held.reserve,) * len(available)
    targets = [free - reserve - overhead for free, reserve in zip(available, reserves, strict=True)]
    shares = spread.shares or [max(free - held.begun, 0) for free in available]
    if sum(shares) <= 0:
        raise UnknownVerdictError("no device has free memory")
    first_split = default_split(layers.total, shares)

    @cache
    def final(times: float, without_copies: float | None = None) -> Layout:
        """The layout if every device holds so many times its uncertainty more than predicted; without copies, so many."""

        def upper(layout: Layout) -> list[float]:
            apart = without_copies is not None and not pipelined(layout, layers.total)
            return memory.at(layout, (without_copies or 0.0) if apart else times)

        if not spread.rearranges:
            met = all(one <= target for one, target in zip(upper(first_split), targets, strict=True))
            return first_split if met else ()
        return fit(first_split, targets, upper, experts=moe)

    def complete(layout: Layout) -> bool:
        """Nothing on the host: experts that one device has no room for may be on the next."""
        if sum(part.layers for part in layout) != layers.total:
            return False
        return not any(part.partial for part in layout) or placed_on(layers, layout).host_share < _NOTHING

    def meets(layout: Layout, times: float) -> bool:
        return all(size <= target for size, target in zip(memory.at(layout, times), targets, strict=True))

    def whole(times: float) -> Layout | None:
        layout = final(times)
        return layout if complete(layout) and meets(layout, times) else None

    ends = [whole(times) for times in (1.0, 0.0, -1.0)]
    certain, likely, _ = ends
    by_law = memory.derived(first_split)
    # Experts that come back may stop short of all of them: in another split than the first they are sure to be on devices only
    # where each end says so, and no compute is calculated.
    if moe and certain != first_split and not all(one is not None and not memory.derived(one) for one in ends):
        certain = None
    # The copies of a pipeline begin with the last layer, and are not looked at again on the devices filled before it: all
    # layers are on devices, some of which keep less than their margin (36 % of the sets of bench/devices.py).
    layouts = [] if certain else [(times, final(times)) for times in (1.0, 0.0, -1.0)]
    staying = [
        complete(layout)
        and all(size <= free - overhead for size, free in zip(memory.at(layout, times), available, strict=True))
        for times, layout in layouts
    ]
    below = certain is None and not moe and spread.rearranges and all(staying)
    if below and by_law:  # how far the search goes follows from differences: they may be off, too
        below = len({*(layout for _, layout in layouts), final(1.0, -1.0), final(-1.0, 1.0)}) == 1
    certain = final(0.0) if below else certain
    # Where it fits at both ends, the split is that of the predicted figures: the upper end may leave another one.
    certain = likely if certain is not None and likely is not None else certain
    shown = certain or likely or first_split
    where = certain
    if certain is None and spread.rearranges:
        again = final(0.0)
        where = again if again != first_split else refit(first_split, targets, memory.held, experts=moe)
    sizes = [round(size + overhead) for size in memory.held(shown)]
    devices = tuple(
        DeviceVerdict(
            name=name,
            required_bytes=size,
            reserve_bytes=min(reserve, free - size) if below else reserve,
            available_bytes=free,
            short_bytes=0 if below else max(size + reserve - free, 0),
            layers=None if where is None else part.layers,
        )
        for name, size, reserve, free, part in zip(names, sizes, reserves, available, where or shown, strict=True)
    )
    return Arranged(
        fits=certain is not None,
        tight=certain is None and (any(one is not None for one in ends) or any(staying)),
        devices=devices,
        placed=placed_on(layers, where or first_split),
        margin_bytes=min(one.available_bytes - one.required_bytes - one.reserve_bytes for one in devices),
        uncertainty_bytes=round(max(memory.doubts(shown))),
        derived=not memory.known.has(shown),
        below_margin=tuple(
            name for name, size, reserve, free in zip(names, sizes, reserves, available, strict=True) if size + reserve > free
        )
        if below
        else (),
    )
