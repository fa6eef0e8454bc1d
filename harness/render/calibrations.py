"""Calibrations for people: one that was made, what would be made, and those of a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from harness.model.calibration import Calibration
from harness.model.record import LoadRequest
from harness.prediction.allocation import Allocation
from harness.render.style import paint
from harness.text import clean
from harness.units import format_size


def planned(model: str, loads: Sequence[LoadRequest], artifact: str) -> Iterator[str]:
    """What a calibration would load and write."""
    yield f"would load {clean(model)}:"
    for load in loads:
        batch = "the engine's batch" if load.num_batch is None else f"batch {load.num_batch}"
        yield f"  {load.context:>7} tokens at {batch}"
    yield f"and write {clean(artifact)}"


def shown(calibration: Calibration) -> Iterator[object]:
    """One calibration as a panel."""
    from harness.render.tables import calibration_panel

    yield calibration_panel(calibration, calibration.id)


def measured(calibration: Calibration, artifact: str, seconds: float) -> Iterator[object]:
    """A calibration that was just measured."""
    yield from shown(calibration)
    yield f"written  {clean(artifact)}  ({seconds:.0f} s)"
    top = calibration.metadata.quality.valid_to
    yield paint("next     ", dim=True) + f"harness predict {clean(calibration.id)} --ctx {top}"


def imported(calibration: Calibration, artifact: str) -> Iterator[object]:
    """A calibration that was just imported."""
    yield from shown(calibration)
    yield f"written  {clean(artifact)}"


def listing(found: Sequence[tuple[str, Calibration]], root: str) -> Iterator[object]:
    """The calibrations of a store, each with its id and variant."""
    from rich.table import Table
    from rich.text import Text

    from harness.render.tables import size_of

    if not found:
        yield f"no calibrations in {clean(root)}; make one with: harness calibrate"
        return
    table = Table(header_style="dim", box=None, padding=(0, 2, 0, 0))
    for name in ("id", "base", "KV / 10k tokens", "compute / 10k tokens", "valid to", "error", "measured on"):
        table.add_column(name, justify="left" if name in ("id", "measured on") else "right")
    for key, calibration in found:
        metadata, constants = calibration.metadata, calibration.constants
        error = metadata.quality.max_error
        table.add_row(
            Text(clean(key), style="bold"),
            size_of(constants.base_vram_gb),
            size_of(constants.kv_cache_gb_per_10k),
            size_of(constants.compute_gb_per_10k),
            f"{metadata.quality.valid_to:,}",
            "–" if error is None else f"{error:.2%}",
            Text(clean(", ".join(gpu.name for gpu in metadata.machine.gpus) or "host memory")),
        )
    yield table


def catalog(engines: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The names of a catalog, and the engines that each is for."""
    for name, known in engines.items():
        yield f"{clean(name):<20} {', '.join(known)}"


def allocation_remarks(allocation: Allocation, calibration: Calibration) -> str:
    """What an allocation takes and from what it follows, as comments of a shell."""
    metadata = calibration.metadata
    on = metadata.machine.gpus[0].name if metadata.machine.gpus else "host memory"
    return clean(
        f"# {allocation.blocks} blocks of {allocation.block_size} tokens and {allocation.spare_blocks} to spare: "
        f"{format_size(allocation.kv_cache_bytes)} beside {format_size(allocation.footprint_bytes)}, "
        f"{format_size(allocation.available_bytes)} are free · largest context {allocation.max_context:,}\n"
        f"# measured with vLLM {metadata.engine.version or '(version unknown)'} on {on}"
    )
