"""Verdicts about a placement that was asked for: so many layers on the GPU, experts on the host, no fit, another reserve.

llama.cpp places layers by itself only where no option did (``common/fit.cpp`` gives up with ``-ngl``, ``-ts`` or ``-ot``).
With layers forced it keeps nothing free and moves nothing: what does not fit is an out-of-memory error. ``--n-cpu-moe N`` puts
the experts of the first N layers on the host (``common/arg.cpp``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.prediction.devices import DeviceVerdict
from harness.prediction.host import host_bytes, with_growth
from harness.prediction.layout import DevicePart
from harness.prediction.memory import Prediction, predict
from harness.prediction.one_memory import decode_speed
from harness.prediction.placement import Compute, Layers, Placed, layers_of, of_devices
from harness.prediction.rules import Rules
from harness.prediction.verdict import Verdict, judge, largest_where, named, unknown
from harness.units import MIB, gib

#: ``--gpu-layers all``: more than any model has.
ALL: Final = 1 << 20
#: How far compute buffers of a split that a dry run has shown may be off beside its contexts.
SPLIT_ERROR: Final = 0.05


class Forced(msgspec.Struct, frozen=True, kw_only=True):
    """A placement that was asked for. ``gpu_layers`` counts from the back, the output layer first; ``reserve`` is bytes.

    ``cpu_moe`` are layers, from the front, whose experts are on the host; without ``fit`` all layers are on the GPU.
    """

    gpu_layers: int | None = None
    cpu_moe: int = 0
    fit: bool = True
    reserve: int | None = None

    @property
    def layers(self) -> bool:
        """Whether the engine is left nothing to place."""
        return self.gpu_layers is not None or bool(self.cpu_moe) or not self.fit

    @property
    def words(self) -> str:
        """The options, as they are typed."""
        count = "all" if self.gpu_layers == ALL else self.gpu_layers
        given = {
            "--gpu-layers": count,
            "--n-cpu-moe": self.cpu_moe or None,
            "--fit": None if self.fit else "off",
            "--reserve": None if self.reserve is None else f"{self.reserve / MIB:.8g}MiB" if self.reserve else "0",
        }
        return " ".join(f"{name} {value}" for name, value in given.items() if value is not None)


#: Nothing was asked: the engine places layers by its own rule.
NOTHING: Final = Forced()


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What a forced placement takes of the GPU, bytes, and how far that may be off."""

    required: int
    doubt: int
    placed: Placed


def judge_as_asked(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...] | None,
    rules: Rules,
    forced: Forced,
    *,
    extrapolate: bool = False,
    names: tuple[str, ...] | None = None,
    search: bool = True,
    env: Mapping[str, str] | None = None,
) -> Verdict:
    """:func:`harness.prediction.verdict.judge` with a placement that was asked for.

    Raises:
        ValueError: context or slots below one.
    """
    asked = calibration
    if forced.reserve is not None:
        placement = msgspec.structs.replace(calibration.metadata.placement, reserve_gb=gib(forced.reserve))
        asked = msgspec.structs.replace(
            calibration, metadata=msgspec.structs.replace(calibration.metadata, placement=placement)
        )
    verdict = judge(
        asked, context, num_parallel, available, rules, extrapolate=extrapolate, names=names, search=search, env=env
    )  # fmt: skip
    needed = usual = predict(calibration, context, num_parallel)
    title = rules.title

    def cannot(why: str) -> Verdict:
        said = msgspec.structs.replace(unknown(calibration, usual, available, why, rules), max_context=None)  # by its own rule
        return with_growth(said, calibration, usual, rules, env)

    if forced == NOTHING or verdict.verdict == "unknown" or not available:
        return verdict
    if calibration.metadata.machine.target == "host" or not rules.spills:
        where = "host memory" if rules.spills else title
        return cannot(f"{forced.words}: a calibration of {where} has no layers to place")
    if not forced.layers:
        rule = rules.placement(asked)
        if rule.go_runner:
            return cannot(f"--reserve: {title} {calibration.metadata.engine.version} decides what it keeps free")
        return verdict
    try:
        cards = rules.spread(calibration, context, num_parallel, available, named(available, names)).cards
        if len(cards) != 1:
            return cannot(f"{forced.words}: forced layers over {len(cards)} devices are not calculated; leave one with --gpu")
        free = available[cards[0]]
        needed = predict(calibration, context, num_parallel, num_batch=rules.batch(calibration, context, num_parallel, free))
        held = hold(calibration, needed, forced, rules)
        most = verdict.max_context
        if search:
            most = largest_where(calibration, lambda one: _fits(calibration, one, num_parallel, free, forced, rules))
    except UnknownVerdictError as error:
        return cannot(error.message)
    margin = free - held.required
    placed = held.placed
    name = named(available, names)[cards[0]]
    device = DeviceVerdict(
        name=name, required_bytes=held.required, reserve_bytes=0, available_bytes=free, short_bytes=max(-margin, 0),
        layers=placed.offloaded,
    )  # fmt: skip
    found = msgspec.structs.replace(
        verdict,
        verdict="fits" if margin >= held.doubt else "offload",
        required_bytes=held.required,
        reserve_bytes=0,
        available_bytes=free,
        short_bytes=max(-margin, 0),
        uncertainty_bytes=held.doubt,
        margin_bytes=margin,
        tight=-held.doubt <= margin < held.doubt,
        max_context=most,
        layers_total=placed.total,
        layers_offloaded=placed.offloaded,
        layers_overflowing=placed.overflowing,
        decode_tokens_per_s=decode_speed(calibration, placed),
        source="derived" if placed.host_bytes else verdict.source,
        devices=(device,),
        host_required_bytes=host_bytes(calibration, needed, placed),
        forced=forced.words,
        fits_by_rule=verdict.verdict == "fits",
        rule_reserve_bytes=verdict.reserve_bytes,
        out_of_memory=margin < held.doubt,
    )
    return with_growth(found, calibration, usual, rules, env)


def _fits(calibration: Calibration, context: int, num_parallel: int, free: int, forced: Forced, rules: Rules) -> bool:
    batch = rules.batch(calibration, context, num_parallel, free)
    held = hold(calibration, predict(calibration, context, num_parallel, num_batch=batch), forced, rules)
    return held.required + held.doubt <= free


def hold(calibration: Calibration, needed: Prediction, forced: Forced, rules: Rules) -> Held:
    """What is on the GPU, and what is left to the host.

    Raises:
        UnknownVerdictError: what a layer takes is not known.
    """
    layers = layers_of(calibration, needed, rules)
    if layers is None or needed.compute_bytes is None:
        if forced.cpu_moe or (forced.gpu_layers or ALL) < ALL:
            raise UnknownVerdictError("the size of each layer is unknown, so the size of a part of them is unknown too")
        count = (calibration.metadata.model.layers or 0) + 1
        whole = Placed(total=count, offloaded=count, overflowing=0, host_share=0.0, host_work=0.0)
        return Held(required=needed.total_bytes, doubt=needed.uncertainty_bytes, placed=whole)
    total = layers.total
    count = min(total if forced.gpu_layers is None else forced.gpu_layers, total)
    if forced.cpu_moe and not any(layers.experts):
        raise UnknownVerdictError("--n-cpu-moe: this calibration's model has no experts")
    (part,) = of_devices(layers, (DevicePart(count),))
    first = total - count
    moved = range(first, min(forced.cpu_moe, len(layers.experts))) if not layers.output_last else range(0)
    experts = part.experts - sum(layers.experts[one] for one in moved)
    compute = Compute(calibration.metadata.placement, layers, needed.context, needed.compute_bytes)
    work = compute.split(count) if count < total else compute.without_experts() if moved else compute.full
    if count < total and moved:
        work = max(work, compute.without_experts())
    on_gpu, overhead = part.dense + experts + part.cache, needed.overhead_bytes or 0
    return Held(
        required=round(on_gpu + work + overhead),
        doubt=_doubt(calibration, needed, work, layers, whole=count == total and not moved),
        placed=_placed(layers, count, len(moved), on_gpu, experts, part.dense),
    )


def _doubt(calibration: Calibration, needed: Prediction, work: float, layers: Layers, *, whole: bool) -> int:
    """Beside the prediction's: what splits cost that no dry run has shown, and layers of which only the mean is known."""
    if whole:
        return needed.uncertainty_bytes
    placement = calibration.metadata.placement
    split = SPLIT_ERROR * work if placement.split_compute else max(layers.cache)
    return round(needed.uncertainty_bytes + split + (0.0 if placement.layers_gb else max(layers.dense)))


def _placed(layers: Layers, count: int, moved: int, held: float, experts: float, dense: float) -> Placed:
    every = sum(layers.dense) + layers.output
    use, all_experts = layers.expert_use, sum(layers.experts)
    weights, work = every + all_experts, every + all_experts * use
    return Placed(
        total=layers.total,
        offloaded=count,
        overflowing=moved,
        host_share=min(max(1 - (dense + experts) / weights, 0.0), 1.0) if weights else 0.0,
        host_work=min(max(1 - (dense + experts * use) / work, 0.0), 1.0) if work else 0.0,
        host_bytes=max(round(weights + sum(layers.cache) - held), 0),
    )
