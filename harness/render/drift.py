"""A drift in words and figures, for the terminal, pull requests and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from harness.prediction.drift import Change, Drift, Figure, sentence, sentences
from harness.render.calibrations import none_in
from harness.render.style import paint
from harness.render.tables import Column, Drawn, Table
from harness.text import clean, counted, written
from harness.units import format_size, format_slope, from_gib

if TYPE_CHECKING:
    from harness.maintain.diff import Pair
    from harness.maintain.recalibrate import Recalibration, SurveyedCalibration
    from harness.sweep.merge import Merged

_WORDS: Final = {
    "moved": ("moved", "yellow"),
    "same": ("nothing beyond the measurement error", "green"),
    "untouched": ("the same measurement", "dim"),
    "added": ("added", "cyan"),
    "removed": ("removed", "red"),
}


_MOVED: Final = (Column("", right=False), Column("old"), Column("new"), Column("", rank=1), Column("error", rank=2))


def status_of(pair: Pair) -> str:
    """``added``, ``removed``, ``moved``, ``same`` (measured again, nothing moved) or ``untouched`` (the same measurement)."""
    if pair.drift is None:
        return "added" if pair.old is None else "removed"
    if pair.old == pair.new:
        return "untouched"
    return "moved" if pair.drift.moved else "same"


def show(value: object, digits: int = 6) -> str:
    """A figure as the artifact has it; digests are cut to what tells them apart."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}f}".rstrip("0").rstrip(".") or "0"
    if isinstance(value, int):
        return f"{value:,}"
    text = clean(str(value))
    return f"{text[:19]}…" if text.startswith("sha256:") else text


def percent(figure: Figure) -> str:
    """How far a figure moved, of what it was."""
    if not isinstance(figure.old, int | float) or not isinstance(figure.new, int | float) or not figure.old:
        return ""
    return f"{100 * (figure.new / figure.old - 1):+.1f}%"


def headline(changes: tuple[Change, ...]) -> list[str]:
    """Versions and machines that differ, one line each."""
    return [f"{change.name}: {show(change.old)} → {show(change.new)}" for change in changes]


def effects_of(pair: Pair) -> list[str]:
    """What a drift means, one line each."""
    if pair.drift is None or pair.new is None:
        return []
    bounds = [name for name, one in (("old", pair.old), ("new", pair.new)) if one is not None and one.metadata.bounded]
    said = [f"base and KV cache of the {' and the '.join(bounds)} calibration are bounds: at most these"] if bounds else []
    return [*sentences(pair.drift.effects, pair.new.metadata.machine.target), *said]


def document(pair: Pair) -> dict[str, Any]:
    """One calibration of ``diff --json``: every figure with its tolerance, in the figure's own unit."""
    drift = pair.drift or Drift(figures=(), changes=())
    calibration = pair.new or pair.old
    return {
        "calibration": pair.key,
        "status": status_of(pair),
        "figures": [{**msgspec.to_builtins(figure), "moved": figure.moved} for figure in drift.figures],
        "changes": msgspec.to_builtins(drift.changes),
        "effects": [
            {
                "kind": effect.kind,
                "old": effect.old,
                "new": effect.new,
                "card_gb": effect.card_gb,
                "context": effect.context,
                "text": sentence([effect], calibration.metadata.machine.target if calibration else "gpu"),
            }
            for effect in drift.effects
        ],
    }


def pairs_text(found: Sequence[Pair], names: tuple[str, str] | None = None) -> Iterator[str | Drawn]:
    """Each calibration: what moved, by how much, and what that means; ``names`` of both sides, where there may be none."""
    if not found and names is not None:
        yield f"no calibrations in {clean(names[0])} and {clean(names[1])}"
    for pair in found:
        word, colour = _WORDS[status_of(pair)]
        yield f"{paint(written(pair.key), bold=True)}  {paint(word, colour)}"
        if pair.drift is None:
            continue
        for line in headline(pair.drift.changes):
            yield paint(f"  {line}", dim=True)
        if pair.drift.moved:
            yield Table(_MOVED, [figure_cells(figure) for figure in pair.drift.moved], indent=2)
        for line in effects_of(pair):
            yield paint(f"  {line}", bold=True)


def figure_cells(figure: Figure) -> tuple[str, str, str, str, str]:
    """Name, old, new, how far it moved, and the measurement error, in the form that the figure has everywhere."""
    shown = [figure_text(figure, one) for one in (figure.old, figure.new, figure.tolerance)]
    error = "" if figure.tolerance is None else f"± {shown[2]}"
    return clean(figure_name(figure)), shown[0], shown[1], percent(figure), error


def figure_text(figure: Figure, value: object) -> str:
    """A value of a figure in its unit: a size, KiB/token, or as it is."""
    if isinstance(value, int | float) and figure.name.endswith("_gb_per_10k"):
        return format_slope(value)
    if isinstance(value, int | float) and figure.name.endswith("_gb"):
        return format_size(from_gib(value))
    return show(value)


def figure_name(figure: Figure) -> str:
    """What people call a figure of the artifact."""
    where, _, name = figure.name.rpartition(" ")
    plain = name.removesuffix("_per_10k").removesuffix("_gb").removesuffix("_vram").replace("kv_cache", "KV cache")
    plain = {"num_batch": "physical batch", "num_parallel": "slots"}.get(plain, plain)
    return " ".join(filter(None, (where, plain.replace("_", " "))))


def described(pair: Pair) -> tuple[str, tuple[str, ...]]:
    """The status of a pair, and lines on what moved and what that means."""
    if pair.drift is None:
        return status_of(pair), ()
    return status_of(pair), (*headline(pair.drift.changes), *_moved(pair.drift), *effects_of(pair))


def _moved(drift: Drift) -> tuple[str, ...]:
    rows = map(figure_cells, drift.moved)
    return tuple(f"{name}: {old} → {new} {moved_by}".rstrip() for name, old, new, moved_by, _ in rows)


def merged_text(found: Sequence[Merged]) -> Iterator[str]:
    """What became of each artifact of a merge; those that are the same here are only counted."""
    for one in found:
        if one.action == "same":
            continue
        where = clean(f"{one.source} -> {one.target}" if one.target else one.source)
        yield f"{one.action:>10}  {where}{f'  ({clean(one.reason)})' if one.reason else ''}"
        if one.action == "conflict" and one.drift is not None:
            yield from (f"{'':>12}{line}" for line in _moved(one.drift))
    if not found:
        yield "nothing to merge: there is no calibration and no run in what was named"
        return
    actions = Counter(one.action for one in found)
    yield ", ".join(f"{number:,} {action}" for action, number in actions.items())
    if actions["conflict"]:
        yield "nothing here was overwritten; harness diff shows more, --newer takes the newer one"


def survey_text(targets: Sequence[SurveyedCalibration], root: object, only_stale: bool) -> Iterator[str]:
    """What is stale and why, and what would be loaded."""
    for target in targets:
        word, colour = ("stale", "yellow") if target.stale else ("as measured", "green")
        if target.answers is not None:
            word, colour = f"of another GPU; here {target.answers} answers", "blue"
        elif not target.stale and target.age.unknown:
            word = f"as measured, as far as can be seen (unknown: {', '.join(target.age.unknown)})"
        yield f"{paint(clean(target.key), bold=True)}  {paint(clean(word), colour)}"
        for reason in target.age.reasons:
            yield f"  {reason.name}: {show(reason.old)} → {show(reason.new)}"
        if target.stale or not only_stale:
            plan = ", ".join(f"{load.context:,} at batch {show(load.num_batch)}" for load in target.loads)
            yield paint(f"  would load {plan}", dim=True)
    if not targets:
        yield none_in(root)


def outcomes_text(outcomes: Sequence[Recalibration], total: int, root: object, only_stale: bool) -> Iterator[str | Drawn]:
    """What each calibration that was measured again has become, of ``total``."""
    if not total:
        yield none_in(root)
    elif not outcomes:
        what = "is stale in" if only_stale else "can be measured here of"
        yield f"nothing {what} {counted(total, 'calibration')}"
    yield from pairs_text([one.pair() for one in outcomes if one.new is not None])
    for outcome in outcomes:
        if outcome.error is not None:
            word = "not replaced" if outcome.status == "narrower" else "failed"
            yield f"{paint(clean(outcome.target.key), bold=True)}  {paint(word, 'red')}"
            yield f"  {clean(outcome.error.message)}"
            if outcome.error.hint:
                yield f"  {clean(outcome.error.hint)}"
