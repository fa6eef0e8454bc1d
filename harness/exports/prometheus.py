"""Predicted memory as metrics, in Prometheus' text format, for node_exporter's textfile collector.

Names follow llama.cpp's proposal (pull request #26130: ``memory_model_bytes``, ``_context_``, ``_compute_`` by device).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from harness.exports.entry import Entry, comments
from harness.prediction.memory import predict

#: Name and help of each metric; all are gauges.
METRICS: Final[dict[str, str]] = {
    "harness_memory_model_bytes": "Predicted memory of weights.",
    "harness_memory_context_bytes": "Predicted memory of KV caches and recurrent state.",
    "harness_memory_compute_bytes": "Predicted memory of compute buffers.",
    "harness_memory_overhead_bytes": "Measured memory beyond the engine's log: driver context, workspaces, heap.",
    "harness_memory_predicted_bytes": "Predicted memory, all parts together.",
    "harness_memory_uncertainty_bytes": "Half the width of the prediction interval.",
    "harness_memory_reserve_bytes": "Memory that the engine keeps free beside the model.",
    "harness_context_tokens": "Tokens per slot that the prediction is for.",
    "harness_calibrated_timestamp_seconds": "When the calibration was made.",
}


class MetricSample(NamedTuple):
    """One value of a metric, with its labels."""

    name: str
    labels: dict[str, str]
    value: float


def predicted(entry: Entry) -> Iterable[MetricSample]:
    """What is known of a model before it runs; what is not known has no sample."""
    verdict = entry.verdict
    parts = predict(entry.calibration, verdict.context, verdict.num_parallel)
    context = None if parts.context_cache_bytes is None else parts.context_cache_bytes + (parts.fixed_cache_bytes or 0)
    labels = {"model": entry.model, "engine": entry.calibration.engine, "calibration": entry.key}
    for name, value in {
        "harness_memory_model_bytes": parts.weights_bytes,
        "harness_memory_context_bytes": context,
        "harness_memory_compute_bytes": parts.compute_bytes,
        "harness_memory_overhead_bytes": parts.overhead_bytes,
        "harness_memory_predicted_bytes": verdict.required_bytes,
        "harness_memory_uncertainty_bytes": verdict.uncertainty_bytes,
        "harness_memory_reserve_bytes": verdict.reserve_bytes,
        "harness_context_tokens": verdict.context,
        "harness_calibrated_timestamp_seconds": _seconds(entry.calibration.metadata.calibrated_at),
    }.items():
        if value is not None:
            yield MetricSample(name, labels, value)


def _seconds(time: str) -> float | None:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return None  # a day that no month has


def exposition(samples: Iterable[MetricSample], helps: dict[str, str]) -> str:
    """Samples in the text format 0.0.4: all of a metric together."""
    found: dict[str, list[MetricSample]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample)
    lines = []
    for name in (one for one in helps if one in found):
        lines += [f"# HELP {name} {helps[name]}", f"# TYPE {name} gauge"]
        for _, labels, value in found[name]:
            inside = ",".join(f'{key}="{quoted(text)}"' for key, text in labels.items())
            lines.append(f"{name}{f'{{{inside}}}' if inside else ''} {value:.10g}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A label's value with its escapes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write(entries: Sequence[Entry], _style: str, _together: Sequence[Sequence[int]]) -> str:
    """A file for the collector."""
    return comments(entries) + exposition([one for entry in entries for one in predicted(entry)], METRICS)
