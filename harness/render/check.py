"""Verdicts as sentences. No table library: ``check`` runs before every start of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.render.reasons import explained
from harness.render.style import paint
from harness.render.verdict import sentence, title
from harness.text import clean, counted

if TYPE_CHECKING:
    from harness.serving.check import Assessment, Check

_HEADS: Final = ("FITS", "WARNING: CPU OFFLOAD LIKELY", "UNCALIBRATED", "UNKNOWN")
#: What stands on a line of its own, so that the command behind it can be copied.
_CALIBRATE: Final = "Calibrate it: "
_COLOURS: Final = {"fits": "green", "offload": "red", "unknown": "yellow"}


def describe(check: Check, *, explain: bool = False) -> list[str]:
    """The lines of ``check``: one sentence group for each model, and whether they live together.

    ``explain``: also how the engine comes to its decision, in its order.
    """
    lines = []
    for one in check.models:
        verdict, calibrate, command = styled(one).partition(_CALIBRATE)
        lines += [paint(clean(title(one)), bold=True), "  " + verdict.rstrip()]
        if command:
            lines.append(f"  {calibrate}{command}")
        if one.chosen is not None and one.chosen.identity == "name":
            lines.append("  Known by its name alone: its weights were not seen here.")
        if explain and one.details is not None:
            lines += ["  " + clean(text) for text in explained(one.details)]
    if len(check.models) > 1:
        lines.append(_together(check))
    return lines


def styled(one: Assessment) -> str:
    """The verdict of one model, its first words in the verdict's colour."""
    text = clean(sentence(one))
    words = next(head for head in _HEADS if text.startswith(head))
    return paint(words, _COLOURS[one.verdict], bold=True) + text[len(words) :]


def _together(check: Check) -> str:
    evicted = [one.request.model for one in check.models if one.fate == "evicted"]
    spilled = [one.request.model for one in check.models if one.fate == "offload"]
    if check.verdict == "fits":
        return paint("TOGETHER: ", "green", bold=True) + "they all fit, started in this order."
    parts = []
    if spilled:
        parts.append(f"{', '.join(spilled)} would be offloaded beside the others")
    if evicted:
        parts.append(f"Ollama would end {', '.join(evicted)}{_why(check)}")
    if not parts:
        return paint("TOGETHER: ", "yellow", bold=True) + "unknown."
    return paint("NOT TOGETHER: ", "red", bold=True) + clean("; ".join(parts)) + "."


def _why(check: Check) -> str:
    """Why an engine ends models: it keeps so many at most, or lacks room."""
    reasons = [reason for one in check.models if one.details is not None for reason in one.details.reasons]
    limits = {reason.figures.get("limit", 0) for reason in reasons if reason.step == "evict-limit"}
    room = ["to make room"] if any(reason.step == "evict-memory" for reason in reasons) or not limits else []
    kept = [
        f"since it keeps at most {counted(int(limit), 'model')} loaded (OLLAMA_MAX_LOADED_MODELS)" for limit in sorted(limits)
    ]
    return " " + " and ".join((*room, *kept))
