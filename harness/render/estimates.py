"""Estimates of many models as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.render.style import paint
from harness.render.tables import Column, Drawn, Table
from harness.text import clean
from harness.units import format_size

if TYPE_CHECKING:
    from harness.serving.estimate_table import EstimateCell, EstimateRow, EstimateTable

_COLOURS = {"fits": "green", "offload": "red", "unknown": "yellow"}


def estimates_text(found: EstimateTable) -> Iterator[str | Drawn]:
    """Rows of models, a column for each context, and the largest context that fits."""
    contexts = sorted({cell.context for row in found.rows for cell in row.contexts})
    columns = (
        Column("model", right=False), Column("KV", right=False), Column("file", rank=len(contexts) + 1),
        *(Column(f"at {context:,}", rank=len(contexts) - number) for number, context in enumerate(contexts)),
        Column("largest context"),
    )  # fmt: skip
    rows = []
    for row in found.rows:
        if row.error is not None:
            yield paint(clean(f"{row.name}: {row.error}"), "red")
            continue
        cells = {cell.context: _cell(cell) for cell in row.contexts}
        sizes = [cells.get(context, "–") for context in contexts]
        rows.append(
            (paint(clean(row.name), bold=True), row.kv_cache_type, format_size(row.file_bytes, 1), *sizes, _largest(row))
        )
    yield paint(_heading(found), "cyan", bold=True)
    yield Table(columns, rows)
    yield paint(_legend(found), dim=True)


def _cell(cell: EstimateCell) -> str:
    mark = "*" if cell.tight and cell.verdict == "fits" else ""
    return paint(format_size(cell.required_bytes, 1) + mark, "yellow" if mark else _COLOURS[cell.verdict])


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
    bound = f"good to ± {100 * max(doubts):.0f}%, and the upper end decides; " if doubts else ""
    later = [
        cell.host_growth_bytes or 0
        for row in found.rows
        for cell in row.contexts
        if cell.tight and cell.verdict == "fits"
    ]  # fmt: skip
    tight = f"; * tight: later its server may take up to {format_size(max(later), 1)} more of host memory" if later else ""
    return clean(f"{bound}{found.overhead.removeprefix('not measured: ')}{tight}")
