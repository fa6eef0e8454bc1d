"""What an engine did with a load, beside what was said before it started."""

from __future__ import annotations

from typing import Final

from harness.fit.observations import spill_reason
from harness.model.facts import LoadFacts
from harness.model.record import Target
from harness.prediction.rules import Rules
from harness.prediction.verdict import Verdict

#: Layers by which a foreseen split may be off and still count as foreseen.
LAYERS: Final = 2


def describe_placement(facts: LoadFacts, target: Target) -> str:
    """What the log says, for people."""
    if target == "host":
        return spill_reason(facts, target, ready=True) or "everything is in host memory"
    if facts.layers_offloaded is None or facts.layers_total is None:
        return spill_reason(facts, target, ready=True) or "everything is on the GPU"
    over = f", {facts.layers_overflowing} of them with experts on the host" if facts.layers_overflowing else ""
    return f"{facts.layers_offloaded} of {facts.layers_total} layers are on the GPU{over}"


def disagreement(verdict: Verdict, facts: LoadFacts, rules: Rules) -> str | None:
    """In what the engine did something else than the verdict said; ``None``: they agree, or the verdict says nothing."""
    if verdict.verdict == "unknown":
        return None
    if not rules.spills:
        return "it was not to start, and it did" if verdict.verdict == "offload" and facts.complete else None
    spilled = spill_reason(facts, verdict.basis, ready=True)
    if verdict.basis == "host":
        return f"predicted: in host memory; observed: {spilled}" if spilled else None
    if verdict.verdict == "fits":
        return f"predicted: fits; observed: {spilled}" if spilled else None
    if spilled is None:
        return "predicted: CPU offload; observed: everything is on the GPU"
    foreseen, seen = verdict.layers_offloaded, facts.layers_offloaded
    if foreseen is not None and seen is not None and abs(foreseen - seen) > LAYERS:
        return f"{foreseen} of {verdict.layers_total} layers were to stay on the GPU, and {seen} did"
    return None
