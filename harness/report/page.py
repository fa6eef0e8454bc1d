"""One self-contained HTML page: data, script, style and the plotting library in one file. Pure.

Names and notes are data: they reach the page as JSON in a script element that no text can end, and the page's script makes text
nodes of them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from harness.engines.registry import BUILT_IN, policy_of
from harness.model.calibration import Calibration, to_document
from harness.model.record import Record
from harness.model.trace import READING_ERROR
from harness.prediction.memory import UNMEASURED_ERROR
from harness.prediction.rules import FIT_TARGET
from harness.units import CELL_PADDING, MIB, TOKENS_PER_UNIT


class ReportEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration of the store, and the record of its run where it is still there. ``key`` is ``engine/name[@variant]``."""

    key: str
    calibration: Calibration
    record: Record | None = None


class DriftLine(msgspec.Struct, frozen=True, kw_only=True):
    """What moved in one calibration, in words."""

    key: str
    status: str
    lines: tuple[str, ...]


class Assets(msgspec.Struct, frozen=True, kw_only=True):
    """The texts that the page is made of."""

    css: str
    scripts: tuple[str, ...]
    plotly: str


def planner_figures() -> dict[str, object]:
    """The figures of the engines' rules as data, for the page's planner; bytes, tokens, percent, a release."""
    found: dict[str, object] = {"fit_target": FIT_TARGET}
    for name in BUILT_IN:
        found |= policy_of(name).figures()
    return {
        **found,
        "tokens_per_unit": TOKENS_PER_UNIT,
        "cell_padding": CELL_PADDING,
        "unmeasured_error": UNMEASURED_ERROR,
        "reading_error": READING_ERROR,
        "reading_error_else": MIB,
    }


def page(
    entries: Sequence[ReportEntry],
    assets: Assets,
    *,
    subtitle: str,
    drift: Sequence[DriftLine] = (),
    against: str | None = None,
) -> str:
    """The page's text."""
    data = {
        "calibrations": [_entry(entry) for entry in entries],
        "rules": planner_figures(),
        "drift": msgspec.to_builtins(drift),
        "against": against,
    }
    scripts = "\n".join(f"<script>\n{script}</script>" for script in assets.scripts)
    return f"""<!doctype html>
<html lang="en" data-theme="auto">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
img-src data: blob:">
<title>harness report</title>
<link rel="icon" href="data:,">
<style>
{assets.css}</style>
</head>
<body>
<header><h1>Memory of local models</h1><div id="tools"></div></header>
<p class="muted">{html.escape(subtitle)}</p>
<noscript><p>This page draws itself with a script that is part of it.</p></noscript>
<main id="main"></main>
<script type="application/json" id="data">{_json(data)}</script>
<script>{_inert(assets.plotly)}</script>
{scripts}
</body>
</html>
"""


def _entry(entry: ReportEntry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "anchor": re.sub(r"[^A-Za-z0-9]+", "-", entry.key),
        "document": to_document(entry.calibration),
        "traces": _traces(entry.record),
    }


def _traces(record: Record | None) -> list[dict[str, Any]]:
    """The readings of each load, in seconds since it began to be read, and the phases in it."""
    found = []
    for load in record.loads if record else ():
        if load.trace is None or not any(sample.total_bytes for sample in load.trace.samples):
            continue
        batch = f", batch {load.request.num_batch}" if load.request.num_batch else ""
        found.append(
            {
                "title": f"{load.request.context:,} tokens{batch}",
                "seconds": [sample.seconds for sample in load.trace.samples],
                "bytes": [sample.total_bytes for sample in load.trace.samples],
                "marks": [[mark.seconds, mark.phase] for mark in load.trace.marks],
            }
        )
    return found


def _json(data: object) -> str:
    """JSON that cannot end the script element that it stands in, nor open a comment in it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _inert(script: str) -> str:
    """A library's text inside a script element: a closing tag in one of its strings would end the element."""
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)
