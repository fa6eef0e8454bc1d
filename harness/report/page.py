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

from harness.engines.registry import policy_of
from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration, to_document
from harness.model.record import Record, Settings
from harness.prediction.memory import predict
from harness.prediction.planner import planner_table
from harness.units import MIB, gib


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
    calibration = entry.calibration
    metadata = msgspec.structs.replace(calibration.metadata, performance=calibration.metadata.performance.bounded)
    calibration = msgspec.structs.replace(calibration, metadata=metadata)
    return {
        "key": entry.key,
        "anchor": re.sub(r"[^A-Za-z0-9]+", "-", entry.key),
        "document": to_document(calibration),
        "speed_uncertainty": calibration.metadata.performance.uncertainty,
        "settings": _settings(calibration.metadata.settings),
        "fit": _fit(calibration),
        "planner": msgspec.to_builtins(planner_table(calibration, policy_of(calibration.engine))),
        "traces": _traces(entry.record),
    }


def _settings(settings: Settings) -> str:
    """What was asked of the engine: the settings that all have, or its own."""
    if own := settings.own:
        given = {name.partition(" ")[2]: value for name, value in own.items() if value not in (None, "", False)}
        named = (f"{name.replace('_', ' ')} {value}" for name, value in given.items() if name != "model")
        return " · ".join((*named, f"KV {settings.kv_cache_type}"))
    slots = f"{settings.num_parallel} slot{'s' if settings.num_parallel > 1 else ''}"
    batch = f"batch {settings.num_batch or 'as the engine chooses'}"
    return f"{slots} · {batch} · KV {settings.kv_cache_type} · flash attention {settings.flash_attention or 'unknown'}"


def _fit(calibration: Calibration) -> dict[str, Any]:
    """The lines of a calibration at its own slots, GiB, and its loads with their distance from them, MiB.

    The loads of an engine that fills what it is given are on no line over the context.
    """
    metadata = calibration.metadata
    own = metadata.settings.num_parallel

    def total(context: int, num_batch: int | None) -> int | None:
        try:
            return predict(calibration, context, own, num_batch=num_batch).total_bytes
        except UnknownVerdictError:
            return None

    lines, start = [], 0
    for band in metadata.bands:
        contexts = [start + (band.up_to - start) * step // 16 for step in range(17)]
        sizes = [total(max(context, 256), band.num_batch) for context in contexts]
        batch = "" if band.num_batch is None else f", batch {band.num_batch}"
        gibs = [None if size is None else gib(size) for size in sizes]
        lines.append({"name": f"line to {band.up_to:,}{batch}", "contexts": contexts, "gib": gibs})
        start = band.up_to
    loads = metadata.quality.loads if policy_of(calibration.engine).spills else ()
    predicted = [total(load.context, load.num_batch) for load in loads]
    return {
        "lines": lines,
        "loads": [[load.context, load.total_gb] for load in loads],
        "off_mib": [
            None if size is None else load.total_gb * 1024 - size / MIB for load, size in zip(loads, predicted, strict=True)
        ],
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
