"""The core's functions with the rules of the calibration's own engine: what the workflows hand to them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.engines.ollama.policy import estimated as ollama_estimate
from harness.engines.registry import policy_of
from harness.model.calibration import Calibration
from harness.prediction import drift, placement, together, verdict
from harness.prediction.memory import Prediction, predict
from harness.prediction.rules import LoadedModel, Rule, Rules

__all__ = [
    "batch_of", "compare", "errors_of", "evicts_others", "judge", "judge_together", "largest_context", "layers_of",
    "ollama_estimate", "place", "rule_of",
]  # fmt: skip


def _rules(calibration: Calibration) -> Rules:
    return policy_of(calibration.engine)


def judge(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...] | None,
    *,
    extrapolate: bool = False,
) -> verdict.Verdict:
    return verdict.judge(calibration, context, num_parallel, available, _rules(calibration), extrapolate=extrapolate)


def judge_together(
    requests: Sequence[tuple[Calibration, int, int]], available: tuple[int, ...] | None, *, extrapolate: bool = False
) -> tuple[list[verdict.Verdict], list[together.Fate | None]]:
    return together.judge_together([(*one, _rules(one[0])) for one in requests], available, extrapolate=extrapolate)


def largest_context(calibration: Calibration, num_parallel: int, available: tuple[int, ...] | None) -> int | None:
    return verdict.largest_context(calibration, num_parallel, available, _rules(calibration))


def rule_of(calibration: Calibration) -> Rule:
    return _rules(calibration).placement(calibration)


def batch_of(calibration: Calibration, context: int, num_parallel: int, available: int | None) -> int | None:
    return _rules(calibration).batch(calibration, context, num_parallel, available)


def evicts_others(calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...], loaded: int) -> bool:
    names = tuple(f"GPU{index}" for index in range(len(available)))
    some = [LoadedModel(name=str(index)) for index in range(loaded)]
    return bool(_rules(calibration).evicted(calibration, context, num_parallel, available, names, some))


def place(
    calibration: Calibration, context: int, num_parallel: int, budget: int, num_batch: int | None
) -> placement.Placed | None:
    needed = predict(calibration, context, num_parallel, num_batch=num_batch)
    return placement.Placer(calibration, needed, _rules(calibration)).place(budget)


def layers_of(calibration: Calibration, needed: Prediction) -> placement.Layers | None:
    return placement.layers_of(calibration, needed, _rules(calibration))


def compare(old: Calibration, new: Calibration) -> drift.Drift:
    return drift.compare(old, new, (_rules(old), _rules(new)))


def errors_of(calibration: Calibration) -> drift.Errors:
    return drift.errors_of(calibration, _rules(calibration))
