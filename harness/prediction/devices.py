"""What each of several devices holds of a model, and whether every one of them has the room.

llama.cpp tests each device against its own margin (``common/fit.cpp``): the sum proves nothing. From a calibration on one
device follow weights and caches of every layer, and compute buffers by this law (``src/llama-context.cpp``; measured with
b11434 over two and three ``ggml-rpc-server`` and over virtual CUDA devices): with every layer and the output on devices the
scheduler keeps four copies of its inputs, so that the attention mask, which grows with the context, counts four times on each
device that attends to everything. The part that does not grow is 0.4 to 1.9 times that of one device (copies of activations,
logits on the last device alone): that is the bound of the law.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.layout import Layout, default_split, fit, pipelined, refit
from harness.prediction.memory import Prediction
from harness.prediction.placement import Compute, Placed, layers_of, of_devices, placed_on
from harness.prediction.rules import Rules, Spread
from harness.units import TOKENS_PER_UNIT, from_gib, pad_cells

#: Copies that the scheduler keeps of its inputs (ggml-backend.cpp, ``GGML_SCHED_MAX_COPIES``).
COPIES: Final = 4


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One device; bytes. ``layers`` is what the engine puts there, ``None`` where it is not known; the output is a layer."""

    name: str
    required_bytes: int
    reserve_bytes: int
    available_bytes: int
    short_bytes: int
    layers: int | None


class Arranged(msgspec.Struct, frozen=True, kw_only=True):
    """A model over devices. ``uncertainty_bytes`` is that of the device where it is largest; ``tight``: it may fit or not."""

    fits: bool
    tight: bool
    devices: tuple[DeviceVerdict, ...]
    placed: Placed
    margin_bytes: int
    uncertainty_bytes: int


def arrange(
    calibration: Calibration, needed: Prediction, spread: Spread, available: Sequence[int], names: Sequence[str], rules: Rules
) -> Arranged:
    """Lay a model over the devices that ``spread`` names, as the engine does.

    Args:
        calibration: made on one device or more.
        needed: its prediction, in the batch that the engine will take.
        spread: which devices, and how.
        available: free bytes of each device of ``spread``, in its order.
        names: of the same devices.
        rules: the engine's.

    Raises:
        UnknownVerdictError: the layers are not known, or no device has any memory.
    """
    layers = layers_of(calibration, needed, rules)
    if layers is None or needed.compute_bytes is None or layers.output_last:
        raise UnknownVerdictError("what each layer takes is not known, so what each of several devices takes is not either")
    measured_on = max(len(calibration.metadata.machine.gpus), 1)
    settings = calibration.metadata.settings
    band = calibration.band_for(needed.context, needed.num_batch, needed.num_parallel)
    growing = from_gib(band.compute_gb_per_10k) * pad_cells(needed.context) / TOKENS_PER_UNIT
    constant = max(needed.compute_bytes - growing, 0.0) / measured_on
    mask = pad_cells(needed.context) * (needed.num_batch or settings.num_batch or 512)
    mask *= 4 if settings.flash_attention == "disabled" else 2
    copied = growing + (COPIES - 1) * mask if measured_on == 1 else growing / measured_on
    single = needed.compute_bytes if measured_on == 1 else constant + max(copied - (COPIES - 1) * mask, 0.0)
    compute = Compute(calibration.metadata.placement, layers, needed.context, round(single))
    overhead = _driver(needed) / measured_on
    kinds = (calibration.metadata.placement.layer_kinds or "f" * len(layers.dense)) + "-"
    attends = [kind in "fb" for kind in kinds.ljust(layers.total, "-")]
    one_layer = 0.0 if calibration.metadata.placement.layers_gb else max(layers.dense)

    def held(layout: Layout) -> list[float]:
        """Weights, caches and compute of each device."""
        parts = [sum(one) for one in of_devices(layers, layout)]
        offloaded = sum(part.layers for part in layout)
        first, start = next((index for index, part in enumerate(layout) if part.layers), 0), layers.total - offloaded
        for index, part in enumerate(layout):
            if pipelined(layout, layers.total):
                parts[index] += constant + (copied if any(attends[start : start + part.layers]) else 0.0)
            elif part.layers:
                alone = compute.without_experts() if offloaded == layers.total else compute.split(offloaded)
                parts[index] += alone if index == first else compute.full
            start += part.layers
        return parts

    reserves = spread.reserves or (rules.placement(calibration).reserve_of(round(overhead)),) * len(available)
    targets = [free - reserve - overhead for free, reserve in zip(available, reserves, strict=True)]
    begun = from_gib(calibration.metadata.placement.start_gb or 0.0)
    shares = spread.shares or [max(free - begun, 0) for free in available]
    if sum(shares) <= 0:
        raise UnknownVerdictError("none of the devices has memory that is free")
    first_split = default_split(layers.total, shares)
    moe = any(layers.experts)
    doubt = [needed.uncertainty_bytes * size / max(needed.total_bytes, 1) + constant + one_layer for size in held(first_split)]

    def final(times: float) -> Layout:
        """The layout where every device holds so many times its uncertainty more than predicted."""

        def upper(layout: Layout) -> list[float]:
            return [max(size + times * more, 0.0) for size, more in zip(held(layout), doubt, strict=True)]

        if not spread.rearranges:
            met = all(one <= target for one, target in zip(upper(first_split), targets, strict=True))
            return first_split if met else ()
        return fit(first_split, targets, upper, experts=moe)

    def complete(layout: Layout) -> bool:
        return sum(part.layers for part in layout) == layers.total and not any(part.partial for part in layout)

    def meets(layout: Layout, times: float) -> bool:
        sizes = held(layout)
        return all(size + times * more <= target for size, more, target in zip(sizes, doubt, targets, strict=True))

    def whole(times: float) -> Layout | None:
        layout = final(times)
        return layout if complete(layout) and meets(layout, times) else None

    certain, likely = whole(1.0), whole(0.0)
    # Experts that come back may stop short of all of them (bench/devices.py: 2 in 56): with them the first split alone is sure.
    certain = None if moe and certain != first_split else certain
    shown = certain or likely or first_split
    where = certain or (refit(first_split, targets, held, experts=moe) if spread.rearranges else None)
    sizes = [round(size + overhead) for size in held(shown)]
    devices = tuple(
        DeviceVerdict(
            name=name,
            required_bytes=size,
            reserve_bytes=reserve,
            available_bytes=free,
            short_bytes=max(size + reserve - free, 0),
            layers=None if where is None else part.layers,
        )
        for name, size, reserve, free, part in zip(names, sizes, reserves, available, where or shown, strict=True)
    )
    return Arranged(
        fits=certain is not None,
        tight=certain is None and (likely is not None or whole(-1.0) is not None),
        devices=devices,
        placed=placed_on(layers, where or first_split),
        margin_bytes=min(one.available_bytes - one.required_bytes - one.reserve_bytes for one in devices),
        uncertainty_bytes=round(max(doubt)),
    )


def _driver(needed: Prediction) -> int:
    return needed.overhead_bytes or 0
