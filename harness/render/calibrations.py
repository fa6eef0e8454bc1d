"""Calibrations for people: one that was made, what would be made, and those of a store."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from harness.model.calibration import PARTS_UNKNOWN, Calibration
from harness.model.record import LoadRequest
from harness.prediction.allocation import Allocation
from harness.prediction.memory import is_bound
from harness.render.style import paint
from harness.render.tables import Column, Drawn, Fields, Hanging, Table, Verbatim
from harness.text import clean, counted, written
from harness.units import format_size, format_slope, format_sum, from_gib


def planned(model: str, loads: Sequence[LoadRequest], artifact: str) -> Iterator[str | Drawn]:
    """What a calibration would load and write."""
    yield f"would load {clean(model)} {counted(len(loads), 'time')}:"
    rows = [
        (f"{load.context:,} tokens", "the engine's batch" if load.num_batch is None else f"batch {load.num_batch:,}")
        for load in loads
    ]
    yield Table((Column(""), Column("", right=False)), rows, indent=2)
    yield f"would write {clean(artifact)}"


def shown(calibration: Calibration, key: str | None = None) -> Iterator[str | Drawn]:
    """One calibration: its line, what base is made of, quality and speeds. ``key``: its id with the variant."""
    yield paint(written(key or calibration.id), "cyan", bold=True)
    yield Fields(tuple((name, clean(value)) for name, value in _facts(calibration)))
    yield from (paint(f"  note: {clean(note)}", "yellow") for note in calibration.metadata.quality.notes)


def _facts(calibration: Calibration) -> Iterator[tuple[str, str]]:
    metadata, constants = calibration.metadata, calibration.constants
    quality, model = metadata.quality, metadata.model
    yield "base", _base(calibration)
    blocks = metadata.kv_blocks
    if blocks is not None and metadata.of_one_length:
        most = format_size(blocks.of_sequence(blocks.size) * blocks.bytes)
        yield "KV cache", f"{most} at most for a sequence of up to {blocks.size:,} tokens"
    else:
        with_fixed = " beside the fixed cache, at most" if metadata.bounded else ""
        yield "KV cache", format_slope(constants.kv_cache_gb_per_10k) + with_fixed
    yield "compute", format_slope(constants.compute_gb_per_10k)
    yield "valid to", f"{quality.valid_to:,} tokens"
    yield "model", " · ".join(str(part) for part in (model.name, model.architecture, model.quantization) if part)
    yield "engine", f"{calibration.engine} {metadata.engine.version or '(version unknown)'} on {devices_of(calibration)}"
    yield "settings", _settings(calibration)
    if blocks is not None and not metadata.bounded:
        fixed = f" and {blocks.fixed} per sequence" if blocks.fixed else ""
        yield "KV blocks", f"{format_size(blocks.bytes)} for {blocks.size} tokens × {blocks.per_block}{fixed}"
    if metadata.weights == "header":
        origin = "" if metadata.source is None else f", read from {metadata.source.address}"
        yield "weights", f"zeros: only the header was there{origin}"
    yield "quality", _quality(calibration)
    yield "loads", " · ".join(f"{load.context:,}: {size_of(load.total_gb)}" for load in quality.loads)
    yield "speed", _speed(calibration)


def _base(calibration: Calibration) -> str:
    pieces = calibration.metadata.breakdown_gb
    if pieces.weights is None:
        return f"{size_of(calibration.constants.base_vram_gb)} ({PARTS_UNKNOWN})"
    named = {
        "weights": pieces.weights, "fixed cache": pieces.fixed_cache, "compute": pieces.compute, "overhead": pieces.overhead,
    }  # fmt: skip
    sizes = [None if size is None else from_gib(size) for size in named.values()]
    *parts, total = format_sum(*sizes, 0)
    made_of = " + ".join(f"{name} {size.removesuffix(' MiB')}" for name, size in zip(named, parts, strict=True))
    return f"{at_most(calibration)}{total} = {made_of}"


def at_most(calibration: Calibration) -> str:
    """What stands before constants that are bounds."""
    return "at most " if calibration.metadata.bounded else ""


def _settings(calibration: Calibration) -> str:
    settings = calibration.metadata.settings
    if settings.sequences is not None:
        dtype = settings.dtype or "dtype unknown"
        return f"up to {counted(settings.sequences, 'sequence')} · {dtype} · KV {settings.kv_cache_type}"
    batch = "the engine's batch" if settings.num_batch is None else f"batch {settings.num_batch:,}"
    slots, flash = counted(settings.num_parallel, "slot"), settings.flash_attention or "unknown"
    return f"{slots} · {batch} · KV {settings.kv_cache_type} · flash attention {flash}"


def _quality(calibration: Calibration) -> str:
    quality, meter = calibration.metadata.quality, calibration.metadata.machine.meter
    error = "not measured" if quality.max_error is None else f"{quality.max_error:.3%} (worst load left out)"
    spread = "" if quality.overhead_spread_gb is None else f" · overhead moves by {size_of(quality.overhead_spread_gb)}"
    known = {"log": "logged, not measured", "import": "imported, not measured by harness"}
    return f"error {error}{spread} · {known.get(meter, f'measured by {meter}')}"


def _speed(calibration: Calibration) -> str:
    speed, target = calibration.metadata.performance, calibration.metadata.machine.target
    rates = (
        (speed.prompt_tokens_per_s, "prompt"),
        (speed.decode_tokens_per_s, "decode"),
        (speed.host_decode_tokens_per_s if target == "gpu" else None, "decode on the host alone"),
    )
    return " · ".join(f"{value:,.1f} tokens/s {what}" for value, what in rates if value is not None) or "not measured"


def devices_of(calibration: Calibration) -> str:
    """The GPUs that a calibration was measured on, or the host's memory."""
    return clean(calibration.metadata.machine.devices(", "))


def size_of(gib: float | None) -> str:
    """GiB of the artifact, for people."""
    return "–" if gib is None else format_size(from_gib(gib))


def measured(calibration: Calibration, key: str, artifact: str, spent: Mapping[str, float]) -> Iterator[str | Drawn]:
    """A calibration that was just measured; ``spent``: where its seconds went."""
    yield from shown(calibration, key)
    yield Hanging(f"time     {spent_text(spent)}", _LABEL)
    yield f"written  {clean(artifact)}"
    top = calibration.metadata.quality.valid_to
    yield Verbatim(f"next     harness predict {shlex.quote(f'{written(key)}@{top}')}")


def spent_text(spent: Mapping[str, float]) -> str:
    """Where seconds went, the most first; what is less than a fiftieth of them is in ``other``. The figures add up."""
    least = _WORTH_A_WORD * sum(spent.values())
    named = {name: round(seconds, 1) for name, seconds in spent.items() if seconds >= least and name != "other"}
    named = dict(sorted(named.items(), key=lambda one: -one[1]))
    if other := max(round(sum(spent.values()) - sum(named.values()), 1), 0.0):
        named["other"] = other
    return f"{sum(named.values()):.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in named.items())


def imported(calibration: Calibration, key: str, artifact: str) -> Iterator[str | Drawn]:
    """A calibration that was just imported."""
    yield from shown(calibration, key)
    yield f"written  {clean(artifact)}"


#: Share of a run's seconds above which what they went into is named, and where the values of its last lines begin.
_WORTH_A_WORD: Final = 0.02
_LABEL: Final = 9
#: Columns of a store's calibrations: what a variant differs in stays longest.
_LISTED: Final = (
    Column("id", right=False), Column("base"), Column("KiB/token"), Column("valid to"), Column("error", rank=6),
    Column("quantization", right=False, rank=2), Column("KV type", right=False, rank=1), Column("engine", right=False, rank=3),
    Column("measured", right=False, rank=5), Column("weights", rank=7), Column("device", right=False, rank=4),
)  # fmt: skip


def none_in(root: object) -> str:
    """That a store is empty, and how it gets its first calibration."""
    return f"no calibrations in {clean(str(root))}; make one with: harness calibrate"


def listing(found: Sequence[tuple[str, Calibration]], root: str) -> Iterator[str | Drawn]:
    """The calibrations of a store, each with its id and variant."""
    if not found:
        yield none_in(root)
        return
    yield Table(_LISTED, [_listed(key, calibration) for key, calibration in found])


def _listed(key: str, calibration: Calibration) -> tuple[str, ...]:
    metadata, constants = calibration.metadata, calibration.constants
    error, weights = metadata.quality.max_error, metadata.breakdown_gb.weights
    return (
        paint(written(key), bold=True),
        at_most(calibration) + size_of(constants.base_vram_gb),
        at_most(calibration)
        + format_slope(constants.kv_cache_gb_per_10k + constants.compute_gb_per_10k).removesuffix(" KiB/token"),
        f"{metadata.quality.valid_to:,}",
        "–" if error is None else f"{error:.2%}",
        clean(metadata.model.quantization or "–"),
        clean(metadata.settings.kv_cache_type or "–"),
        clean(metadata.engine.version or "–"),
        metadata.calibrated_at[:10],
        size_of(weights),
        devices_of(calibration),
    )


def catalog(engines: Mapping[str, Iterable[str]]) -> Iterator[str | Drawn]:
    """The names of a catalog, and the engines that each is for."""
    columns = (Column("model", right=False), Column("engines", right=False))
    yield Table(columns, [(clean(name), ", ".join(known)) for name, known in engines.items()])


def allocation_remarks(allocation: Allocation, calibration: Calibration) -> str:
    """What an allocation takes and from what it follows, as comments of a shell."""
    metadata = calibration.metadata
    how = "imported from a log of" if metadata.machine.meter == "import" else "measured with"
    cache = ("at most " if is_bound(calibration, allocation.context) else "") + format_size(allocation.kv_cache_bytes)
    return clean(
        f"# {allocation.blocks} blocks of {allocation.block_size} tokens and {allocation.spare_blocks} to spare: "
        f"{cache} beside {format_size(allocation.footprint_bytes)}, "
        f"{format_size(allocation.available_bytes)} are free · largest context {allocation.max_context:,}\n"
        f"# {how} vLLM {metadata.engine.version or '(version unknown)'} on {metadata.machine.devices()}"
    )
