"""A drift as the text of a pull request: what a maintainer needs to decide, first things first."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness.render.drift import effects_of, figure_cells, show, status_of
from harness.text import clean
from harness.units import format_size, format_slope, from_gib

if TYPE_CHECKING:
    from harness.maintain.diff import Pair
    from harness.model.calibration import Calibration

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~@!&])")
#: What a forge turns into a link without any markup: addresses, mentions, numbers of issues; a space of no width parts them.
_LINKED = re.compile(r"(?<=:)(?=//)|(?<=[wW]{3})(?=\.)|(?<=[@#])|(?<=GH)(?=-)", re.IGNORECASE)


def escape(text: str) -> str:
    """Text of others as one line of markdown that is nothing but text: no link, no mention, no cell, no markup."""
    return _LINKED.sub("\u200b", _SPECIAL.sub(r"\\\1", " ".join(clean(text).split())))


def markdown(found: list[Pair]) -> str:
    """All calibrations: a summary, then those that moved, added and removed ones, and the rest by name."""
    groups: dict[str, list[Pair]] = {"moved": [], "added": [], "removed": [], "same": [], "untouched": []}
    for pair in found:
        groups[status_of(pair)].append(pair)
    lines = [f"**{_summary(groups)}**", ""]
    for pair in groups["moved"]:
        lines += _moved(pair)
    for word, title in (("added", "New"), ("removed", "Gone")):
        if groups[word]:
            lines += [f"### {title}", ""]
            for pair in groups[word]:
                lines.append(f"- {escape(pair.key)}: {_constants(pair.new or pair.old)}")
            lines.append("")
    if groups["same"]:
        lines += ["### Nothing moved beyond the measurement error", ""]
        for pair in groups["same"]:
            changed = "; ".join(_changes(pair))
            lines.append(f"- {escape(pair.key)}{f' ({changed})' if changed else ''}")
        lines.append("")
    if groups["untouched"]:
        lines += ["### Not measured again", "", *(f"- {escape(pair.key)}" for pair in groups["untouched"]), ""]
    return "\n".join(lines)


def _summary(groups: dict[str, list[Pair]]) -> str:
    moved, same = len(groups["moved"]), len(groups["same"])
    parts = [f"{moved} of {moved + same} calibrations that were measured again moved beyond the measurement error"]
    parts += [
        f"{len(groups[word])} {title}"
        for word, title in (("added", "new"), ("removed", "gone"), ("untouched", "not measured again"))
        if groups[word]
    ]
    return ", ".join(parts)


def _changes(pair: Pair) -> list[str]:
    changes = pair.drift.changes if pair.drift else ()
    return [f"{change.name} {escape(show(change.old))} → {escape(show(change.new))}" for change in changes]


def _moved(pair: Pair) -> list[str]:
    assert pair.drift is not None  # noqa: S101 - only pairs with a drift move
    lines = [f"### {escape(pair.key)}", ""]
    if changes := _changes(pair):
        lines += [f"Since: {'; '.join(changes)}.", ""]
    if effects := effects_of(pair):
        lines += [*(f"- {escape(line)}" for line in effects), ""]
    lines += ["| figure | before | after | moved by | measurement error |", "|---|---:|---:|---:|---:|"]
    for figure in pair.drift.moved:
        name, old, new, moved_by, error = figure_cells(figure)
        lines.append(f"| {' | '.join((escape(name), escape(old), escape(new), moved_by, error))} |")
    return [*lines, "", *_trust(pair), ""]


def _trust(pair: Pair) -> list[str]:
    """How far the new figures may be trusted, and where the old ones can be had again."""
    if pair.new is None or pair.old is None:
        return []
    quality = pair.new.metadata.quality
    error = "not measured" if quality.max_error is None else f"{quality.max_error:.3%}"
    contexts = ", ".join(f"{load.context:,}" for load in quality.loads)
    return [
        f"- measured at {contexts} tokens; worst load left out: {error}",
        f"- record `{_run(pair.new)}`, before `{_run(pair.old)}`",
        *(f"- note: {escape(note)}" for note in quality.notes),
    ]


def _run(calibration: Calibration) -> str:
    return re.sub(r"[^A-Za-z0-9._%-]", "", calibration.metadata.run or "none")


def _constants(calibration: Calibration | None) -> str:
    if calibration is None:
        return ""
    constants = calibration.constants
    return (
        f"base {format_size(from_gib(constants.base_vram_gb))}, KV cache {format_slope(constants.kv_cache_gb_per_10k)}, "
        f"compute {format_slope(constants.compute_gb_per_10k)}"
    )
