"""Estimates of many models as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.text import clean
from harness.units import format_size

if TYPE_CHECKING:
    from harness.serving.estimate_table import EstimateRow, EstimateTable

_COLOURS = {"fits": "green", "offload": "red", "unknown": "yellow"}


def estimates_text(found: EstimateTable) -> Iterator[object]:
    """Rows of models, a column for each context, and the largest context that fits."""
    from rich.table import Table
    from rich.text import Text

    contexts = sorted({cell.context for row in found.rows for cell in row.contexts})
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=12)
    table.add_column("KV")
    table.add_column("file", justify="right", no_wrap=True)
    for context in contexts:
        table.add_column(f"at {context:,}", justify="right", no_wrap=True)
    table.add_column("largest", justify="right", no_wrap=True)
    for row in found.rows:
        if row.error is not None:
            yield Text(f"{clean(row.name)}: {clean(row.error)}", style="red")
            continue
        by_context = {cell.context: cell for cell in row.contexts}
        cells = []
        for context in contexts:
            cell = by_context.get(context)
            text = "–" if cell is None else format_size(cell.required_bytes, 1)
            cells.append(Text(text, style="" if cell is None else _COLOURS[cell.verdict]))
        table.add_row(
            Text(clean(row.name), style="bold"), row.kv_cache_type, format_size(row.file_bytes, 1), *cells, _largest(row)
        )
    yield Text(_heading(found), style="bold cyan")
    yield table
    yield Text(_legend(found), style="dim")


def _largest(row: EstimateRow) -> str:
    if row.largest_context is None:
        return "–"
    return f"{row.largest_context:,}" if row.largest_context else "none"


def _heading(found: EstimateTable) -> str:
    where = "host memory" if found.target == "host" else "a GPU"
    free = "not known how much is free" if found.available_bytes is None else f"{format_size(found.available_bytes, 1)} free"
    kept = f" · the engine keeps {format_size(found.reserve_bytes, 1)} of it" if found.reserve_bytes else ""
    return f"ESTIMATED, nothing was measured · {where} · {free}{kept}"


def _legend(found: EstimateTable) -> str:
    doubts = [
        cell.uncertainty_bytes / cell.required_bytes
        for row in found.rows
        for cell in row.contexts
        if cell.required_bytes and cell.uncertainty_bytes is not None
    ]
    bound = f"good to ± {100 * max(doubts):.0f} %, and the upper end decides; " if doubts else ""
    return clean(f"{bound}{found.overhead.removeprefix('not measured: ')}")
