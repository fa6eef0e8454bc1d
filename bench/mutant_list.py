"""The mutants of :mod:`bench.mutants`: changes of one threshold or operator, and the tests that must notice each."""

from __future__ import annotations

from typing import Final, NamedTuple


class Mutant(NamedTuple):
    """``old`` is a piece of code that stands once in ``harness/``; ``tests`` are names of files below ``tests/unit``."""

    old: str
    new: str
    tests: str


_FIT: Final = "test_fit_limits"
_PREDICT: Final = "test_predict_limits"
_VERDICT: Final = "test_verdict_limits"
_DRIFT: Final = "test_drift_limits"
_PAGE: Final = "test_planner_parity"
_SCHEDULER: Final = "test_ollama_scheduler"
_RUN: Final = "test_runner"
_LOGS: Final = "test_log_states"

MUTANTS: Final = (
    # observations and the fit
    Mutant("_SPREAD: Final = 8 * MIB", "_SPREAD: Final = 16 * MIB", _FIT),
    Mutant("_SPREAD_SHARE: Final = 0.005", "_SPREAD_SHARE: Final = 0.01", _FIT),
    Mutant("    if spread > allowed:", "    if spread >= allowed:", _FIT),
    Mutant(
        "left-out load before a run is refused.\nMAX_ERROR: Final = 0.01",
        "left-out load before a run is refused.\nMAX_ERROR: Final = 0.02",
        _FIT,
    ),
    Mutant("LAW_TOLERANCE: Final = 0.02", "LAW_TOLERANCE: Final = 0.2", _FIT),
    Mutant("BEND_SHARE: Final = 1e-4", "BEND_SHARE: Final = 1e-2", _FIT),
    Mutant("BEND: Final = 0.1 * MIB", "BEND: Final = 1.0 * MIB", _FIT),
    Mutant("REPORTED_SHARE: Final = 0.01", "REPORTED_SHARE: Final = 0.03", _FIT),
    Mutant("REPORTED_BYTES: Final = MIB", "REPORTED_BYTES: Final = 4 * MIB", _FIT),
    Mutant("<= max(MIB, 2 * point.uncertainty)", "<= max(4 * MIB, 2 * point.uncertainty)", _FIT),
    Mutant("> (1 if facts.dialect ==", "> (0 if facts.dialect ==", _FIT),
    Mutant("batch != wanted:", "batch < wanted:", _FIT),
    Mutant("BASELINE_TOLERANCE: Final = 16 * MIB", "BASELINE_TOLERANCE: Final = 256 * MIB", _FIT),
    Mutant("SAME_DEPTH: Final = 1.25", "SAME_DEPTH: Final = 2.5", _FIT),
    Mutant("MAX_LOADS: Final = 5", "MAX_LOADS: Final = 50", _FIT),
    Mutant("SMALLEST_KNEE: Final = 2048", "SMALLEST_KNEE: Final = 256", _FIT),
    Mutant("max(min(limit, 16384), batch)", "max(min(limit, 32768), batch)", _FIT),
    # predictions and the engines' rules
    Mutant(
        "band.num_batch is not None and cells < band.num_batch",
        "band.num_batch is not None and cells <= band.num_batch",
        _PREDICT,
    ),
    Mutant("max(seconds, near / 2)", "max(seconds, near)", _PREDICT),
    Mutant("SPEED_UNCERTAINTY: Final = 0.15", "SPEED_UNCERTAINTY: Final = 0.3", _PREDICT),
    Mutant("2 * (self.spread or 0.0)", "(self.spread or 0.0)", _PREDICT),
    Mutant("within = context <= metadata", "within = context < metadata", _PREDICT),
    Mutant("FULL_PERCENT: Final = 80", "FULL_PERCENT: Final = 85", _PREDICT),
    Mutant("HEADROOM_PERCENT: Final = {2048: 60, 1024: 75}", "HEADROOM_PERCENT: Final = {2048: 60, 1024: 80}", _PREDICT),
    Mutant("HEADROOM_PERCENT: Final = {2048: 60, 1024: 75}", "HEADROOM_PERCENT: Final = {2048: 65, 1024: 75}", _PREDICT),
    Mutant("SURCHARGE: Final = {2048: 2 * GIB, 1024: 768 * MIB}", "SURCHARGE: Final = {2048: GIB, 1024: 768 * MIB}", _PREDICT),
    Mutant("SURCHARGE: Final = {2048: 2 * GIB, 1024: 768 * MIB}", "SURCHARGE: Final = {2048: 2 * GIB, 1024: 0}", _PREDICT),
    Mutant("estimates=version < (0, 12, 11)", "estimates=version < (0, 13, 0)", _PREDICT),
    Mutant("LLAMA_SERVER: Final = (0, 30, 0)", "LLAMA_SERVER: Final = (0, 31, 0)", _PREDICT),
    Mutant("GO_MINIMUM: Final = 457 * MIB", "GO_MINIMUM: Final = 400 * MIB", _PREDICT),
    Mutant("\nBATCHES: Final = ((4096, 512),", "\nBATCHES: Final = ((8192, 512),", _PREDICT),
    Mutant("MODELS_PER_CARD: Final = 3", "MODELS_PER_CARD: Final = 4", _PREDICT),
    # verdicts, placement, allocation
    Mutant("if placed is None or placed.host_work == 0.0:", "if placed is None or placed.host_work <= 0.3:", _VERDICT),
    Mutant("fits(max(low, 1) * CELL_PADDING + (CELL_PADDING if start else 0))", "fits(max(low, 1) * CELL_PADDING)", _VERDICT),
    Mutant('"up": 1 / 3, "gate": 2 / 3', '"up": 1 / 3, "gate": 1 / 3', _VERDICT),
    Mutant('"up": 1 / 3, "gate": 2 / 3', '"up": 2 / 3, "gate": 2 / 3', _VERDICT),
    Mutant("for count in range(2, total - 1):", "for count in range(2, total + 1):", _VERDICT),
    Mutant("straight and high.slope > low.slope", "straight and high.slope >= low.slope", _FIT),
    Mutant("    if measured < reach:", "    if measured <= reach:", _FIT),
    Mutant("whole = weights * count // (count + 1)", "whole = weights", _VERDICT),
    Mutant("free[name] -= size", "free[name] -= 0", _VERDICT),
    Mutant(
        "one.required_bytes if whole else max(one.available_bytes - one.reserve_bytes, 0)",
        "one.required_bytes",
        _VERDICT,
    ),
    Mutant("self.full + max(self.layers.cache)", "self.full", _VERDICT),
    Mutant("JITTER: Final = round(0.3 * GIB)", "JITTER: Final = round(0.03 * GIB)", _VERDICT),
    Mutant("HYBRID_SPARE: Final = 0.02", "HYBRID_SPARE: Final = 0.0", _VERDICT),
    Mutant("MARGIN: Final = round(0.15 * GIB)", "MARGIN: Final = round(0.3 * GIB)", _VERDICT),
    Mutant("MARGIN_SHARE: Final = 0.02", "MARGIN_SHARE: Final = 0.01", _VERDICT),
    Mutant("NULL_BLOCKS: Final = 1", "NULL_BLOCKS: Final = 0", _VERDICT),
    Mutant("KV_BYTES: Final = (0, 10, 2)", "KV_BYTES: Final = (0, 10, 3)", _VERDICT),
    Mutant("GRAPHS_IN_BUDGET: Final = (0, 20, 0)", "GRAPHS_IN_BUDGET: Final = (0, 21, 0)", "fit/test_vllm"),
    Mutant("_SMALL_CARD: Final = 8 * GIB", "_SMALL_CARD: Final = 10 * GIB", _SCHEDULER),
    # drift
    Mutant("+ 3 * error.intercept for error, value", "+ 30 * error.intercept for error, value", _DRIFT),
    Mutant("LOG_ROUNDING: Final = 0.02 * MIB", "LOG_ROUNDING: Final = 0.2 * MIB", _DRIFT),
    Mutant("GO_ROUNDING: Final = 0.05 * GIB", "GO_ROUNDING: Final = 0.2 * GIB", _DRIFT),
    Mutant('METER_STEP: Final = {"nvml": 2 * MIB', 'METER_STEP: Final = {"nvml": 4 * MIB', _DRIFT),
    Mutant("SPEED_SPREAD: Final = 0.05", "SPEED_SPREAD: Final = 0.1", _DRIFT),
    Mutant("SPEED_SPREAD_UNKNOWN: Final = 0.15", "SPEED_SPREAD_UNKNOWN: Final = 0.3", _DRIFT),
    Mutant("SPEED_SPREAD_HOST: Final = 0.25", "SPEED_SPREAD_HOST: Final = 0.5", _DRIFT),
    # logs
    Mutant("failed=self.failure is not None and not self.complete", "failed=self.failure is not None", _LOGS),
    Mutant(
        "if model.again or any(context.used for context in model.contexts):\n            load.restart(model)  # a new",
        "if any(context.used for context in model.contexts):\n            load.restart(model)  # a new",
        _LOGS,
    ),
    Mutant("(?<!HTTP )server is listening", "server is listening", _LOGS),
    Mutant("if size[0] and len(load.go) < MANY", "if len(load.go) < MANY", _LOGS),
    Mutant('weights = found["all_vram"] - counted - found.get("scratch", 0)', 'weights = found["all_vram"] - counted', _LOGS),
    Mutant("    if load.complete:\n        return taken", "    if False:\n        return taken", _LOGS),
    Mutant("self.tokens = tokens if self.tokens is None else min(self.tokens, tokens)", "self.tokens = tokens", _LOGS),
    Mutant("if start is not None and start.up:\n            return", "if False:\n            return", _LOGS),
    # the runner
    Mutant("BATCHES_OF_PROMPT: Final = 2", "BATCHES_OF_PROMPT: Final = 1", _RUN),
    Mutant("request.context - 8)", "request.context)", _RUN),
    Mutant("embedding_batch: ClassVar[int] = 2048", "embedding_batch: ClassVar[int] = 512", _RUN),
    Mutant("if limit is not None and request.context >= limit:", "if limit is not None and request.context > limit:", _RUN),
    Mutant("PROMPT_BUDGET: Final = 60.0", "PROMPT_BUDGET: Final = 600.0", _RUN),
    Mutant("DRY_RUNS: Final = 10", "DRY_RUNS: Final = 9", _RUN),
    Mutant("HOST_SHARE: Final = 0.6", "HOST_SHARE: Final = 0.9", _RUN),
    Mutant("STRANGER_MOVE: Final = 16 * MIB", "STRANGER_MOVE: Final = 32 * MIB", _RUN),
    # the tables of the report's planner, and the script that looks them up
    Mutant("if (steps[2 * middle] <= free)", "if (steps[2 * middle] < free)", _PAGE),
    Mutant("own.length >= table.most_loaded", "own.length > table.most_loaded", _PAGE),
    Mutant("Math.max(need - free, 0)", "need - free", _PAGE),
    Mutant("one.engine === engine", "true", _PAGE),
    Mutant("? one.required : Math.max(one.available - one.reserve, 0)", "? one.required : one.required", _PAGE),
    Mutant('table.contexts[found.lastIndexOf("fits")]', 'table.contexts[found.indexOf("fits")]', _PAGE),
    Mutant("(evicts.length && at(evicts, rest))", "evicts.length", _PAGE),
    Mutant("if high - low == 1:\n            yield high", "if high - low == 1:\n            yield low", _PAGE),
    Mutant("needed.total_bytes, reserve, (top,))", "needed.total_bytes, reserve, (needed.total_bytes,))", _PAGE),
    Mutant("found = furthest if furthest + 1 == fitting else None", "found = furthest", "test_layout"),
)
