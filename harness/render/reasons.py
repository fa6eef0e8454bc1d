"""The steps of an engine's decision as sentences, in its own order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.prediction.rules import Reason
from harness.prediction.verdict import Verdict
from harness.text import counted
from harness.units import format_size


def _size(reason: Reason, name: str) -> str:
    return format_size(reason.figures.get(name), 1)


def _cards(reason: Reason) -> str:
    return " and ".join(reason.cards)


def _too_much(reason: Reason) -> str:
    return f"estimate {_size(reason, 'estimate')} > {reason.figures.get('percent')}% of {_size(reason, 'available')}"


_SENTENCES: Final[dict[str, Callable[[Reason], str]]] = {
    "evict-limit": lambda one: f"{one.model} is ended: at most {counted(int(one.figures.get('limit', 0)), 'model')} at once",
    "evict-memory": lambda one: f"{one.model} is ended: {_too_much(one)}",
    "host-only": lambda _: "no GPU is used: every layer is on the host",
    "one-card": lambda one: f"{_cards(one)} is the only card",
    "main-gpu": lambda one: f"{_cards(one)} was asked for (main_gpu)",
    "main-gpu-missing": lambda one: f"main_gpu {one.figures.get('main_gpu')} is no card here",
    "single-card": lambda one: (
        f"estimate {_size(one, 'estimate')} <= {one.figures.get('percent')}% of {_cards(one)}'s "
        f"{_size(one, 'available')}: on that card alone"
    ),
    "no-single-card": lambda one: (
        f"estimate {_size(one, 'estimate')} > {one.figures.get('percent')}% of {_cards(one)}'s {_size(one, 'available')}, "
        "the card with the most free"
    ),
    "spread-set": lambda _: "OLLAMA_SCHED_SPREAD is set: no single card is tried",
    "spread": lambda one: f"spread over {_cards(one)}",
    "other-group": lambda one: f"{_cards(one)} is left out: cards of one library work together",
    "batch": lambda one: f"batch {one.figures.get('batch')} for {one.figures.get('cells')} tokens of all slots",
    "batch-lowered": lambda one: (
        f"batch {one.figures.get('batch')} instead of {one.figures.get('wanted')}: estimate {_size(one, 'estimate')} "
        f"leaves too little of {_size(one, 'available')}"
    ),
    "batch-no-flash-attention": lambda one: f"batch {one.figures.get('batch')}: there is no flash attention",
    "fits-beside": lambda one: (
        f"estimate {_size(one, 'estimate')} fits into {_size(one, 'available')} beside the models that are loaded"
    ),
    "fit-target": lambda one: (
        f"{_size(one, 'target')} are kept free on every card, for a projector of {_size(one, 'projector')}"
    ),
}


def sentence(reason: Reason) -> str:
    """One step in words; a step that is not known here by its name."""
    found = _SENTENCES.get(reason.step)
    return reason.step if found is None else found(reason)


def explained(verdict: Verdict) -> list[str]:
    """The engine's own steps, then what each device holds against its own margin."""
    lines = [sentence(one) for one in verdict.reasons]
    for one in verdict.devices:
        outcome = f"short by {format_size(one.short_bytes, 1)}" if one.short_bytes else "room enough"
        layers = "" if one.layers is None else f", {one.layers} layers"
        lines.append(
            f"{one.name}: {format_size(one.required_bytes, 1)} + {format_size(one.reserve_bytes, 1)} kept free, "
            f"of {format_size(one.available_bytes, 1)}: {outcome}{layers}"
        )
    if verdict.verdict != "unknown":
        lines.append("all layers on the device" if verdict.verdict == "fits" else "some layers go to the host")
    return [f"{number}. {text}" for number, text in enumerate(lines, 1)]
