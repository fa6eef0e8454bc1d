"""Calibrations and predictions as text that one likes to look at."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from harness.model.calibration import PARTS_UNKNOWN, Calibration
from harness.prediction.memory import Prediction
from harness.text import clean
from harness.units import format_size, from_gib, gib

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


#: Columns where there is no terminal to ask.
PIPE_WIDTH: Final = 110


def console(stderr: bool = False) -> Console:
    """A console that draws colours only on terminals and never wraps files at 80 columns by accident."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # as everywhere; rich alone would end with 1

    stream = sys.stderr if stderr else sys.stdout
    return PlainConsole(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def size_of(gib: float | None) -> str:
    """GiB of the artifact, for people."""
    return "–" if gib is None else format_size(from_gib(gib))


def calibration_panel(calibration: Calibration, title: str) -> RenderableType:
    """Constants, what base is made of, quality and speeds of one calibration."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    metadata, constants = calibration.metadata, calibration.constants
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="bold")
    grid.add_column(justify="right", style="cyan")
    grid.add_column(style="dim")
    grid.add_row("base_vram_gb", f"{constants.base_vram_gb:.6f}", size_of(constants.base_vram_gb))
    grid.add_row(
        "kv_cache_gb_per_10k",
        f"{constants.kv_cache_gb_per_10k:.6f}",
        f"{from_gib(constants.kv_cache_gb_per_10k) / 10000 / 1024:.3f} KiB a token",
    )
    grid.add_row(
        "compute_gb_per_10k",
        f"{constants.compute_gb_per_10k:.6f}",
        f"{from_gib(constants.compute_gb_per_10k) / 10000 / 1024:.3f} KiB a token",
    )
    parts = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
    for name in ("weights", "fixed cache", "compute", "overhead"):
        parts.add_column(name, justify="right")
    pieces = metadata.breakdown_gb
    parts.add_row(size_of(pieces.weights), size_of(pieces.fixed_cache), size_of(pieces.compute), size_of(pieces.overhead))
    known: tuple[RenderableType, ...] = (Text("base is made of", style="dim"), parts)
    parts_shown: tuple[RenderableType, ...] = (Text(PARTS_UNKNOWN, style="yellow"),) if pieces.weights is None else known
    lines: list[RenderableType] = [grid, Text(""), *parts_shown, Text("")]
    lines += _details(calibration)
    heading = f"[bold]{clean(title).replace('[', chr(92) + '[')}[/]"
    return Panel(Group(*lines), title=heading, title_align="left", border_style="green", expand=False, padding=(1, 2))


def _details(calibration: Calibration) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    metadata = calibration.metadata
    quality, speed, model = metadata.quality, metadata.performance, metadata.model
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    described = " · ".join(str(part) for part in (model.name, model.architecture, model.quantization) if part)
    unnamed = (
        "a GPU that was not named" if metadata.machine.meter == "import" and metadata.machine.target == "gpu" else "host memory"
    )
    gpus = ", ".join(gpu.name for gpu in metadata.machine.gpus) or unnamed
    engine = f"{calibration.engine} {metadata.engine.version or '(version unknown)'}"
    error = "not measured" if quality.max_error is None else f"{quality.max_error:.3%} (worst load left out)"
    grid.add_row("model", Text(clean(described)))
    grid.add_row("engine", Text(clean(f"{engine} on {gpus}")))
    settings = metadata.settings
    slots = f"{settings.num_parallel} slot{'s' if settings.num_parallel > 1 else ''}"
    flash = settings.flash_attention or "unknown"
    chosen = f"{slots} · batch {settings.num_batch} · KV {settings.kv_cache_type} · flash attention {flash}"
    if settings.sequences is not None:
        chosen = f"up to {settings.sequences} sequences · {settings.dtype or 'dtype unknown'} · KV {settings.kv_cache_type}"
    grid.add_row("settings", Text(clean(chosen)))
    if metadata.kv_blocks is not None:
        blocks = metadata.kv_blocks
        fixed = f" and {blocks.fixed} a sequence" if blocks.fixed else ""
        grid.add_row("KV blocks", Text(f"{size_of(gib(blocks.bytes))} for {blocks.size} tokens × {blocks.per_block}{fixed}"))
    spread = "" if quality.overhead_spread_gb is None else f" · overhead moves by {size_of(quality.overhead_spread_gb)}"
    known = {"log": "logged, not measured", "import": "imported: the totals were measured by others"}
    meter = known.get(metadata.machine.meter, f"measured by {metadata.machine.meter}")
    if metadata.weights == "header":
        where = "" if metadata.source is None else f", read from {metadata.source.address}"
        grid.add_row("weights", Text(clean(f"zeros: only the header was there{where}")))
    grid.add_row("quality", Text(f"error {error}{spread} · {meter}"))
    grid.add_row("points", Text(" · ".join(f"{load.context:,}: {size_of(load.total_gb)}" for load in quality.loads)))
    grid.add_row("valid to", Text(f"{quality.valid_to:,} tokens"))
    rates = [
        f"{value:.1f} tokens/s {what}"
        for value, what in (
            (speed.prompt_tokens_per_s, "prompt"),
            (speed.decode_tokens_per_s, "decode"),
            (speed.host_decode_tokens_per_s if metadata.machine.target == "gpu" else None, "decode on the host alone"),
        )
        if value is not None
    ]
    grid.add_row("speed", Text(" · ".join(rates) or "not measured"))
    out: list[RenderableType] = [grid]
    return [*out, *(Text(f"note: {clean(note)}", style="yellow") for note in quality.notes)]


def prediction_table(prediction: Prediction, title: str) -> RenderableType:
    """Memory by part."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="dim", box=None, padding=(0, 2, 0, 0))
    table.add_column(Text(clean(title), style="bold"), no_wrap=True)
    table.add_column("memory", justify="right")
    rows = (
        ("weights", prediction.weights_bytes),
        ("fixed cache", prediction.fixed_cache_bytes),
        ("context cache", prediction.context_cache_bytes),
        ("compute", prediction.compute_bytes),
        ("overhead", prediction.overhead_bytes),
    )
    for name, size in rows:
        table.add_row(name, format_size(size))
    table.add_section()
    bound = "" if prediction.uncertainty_bytes is None else f" ± {format_size(prediction.uncertainty_bytes)}"
    table.add_row("[bold]total[/]", f"[bold]{format_size(prediction.total_bytes)}[/]{bound}")
    return table
