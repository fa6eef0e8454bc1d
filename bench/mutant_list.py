"""The mutants of :mod:`bench.mutants`: changes of one threshold or operator, and the tests that must notice each."""

from __future__ import annotations

from typing import Final, NamedTuple


class Mutant(NamedTuple):
    """``old`` stands once in ``harness/``; ``tests`` are names of files below ``tests/unit`` and ``tests/cli``."""

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
_HOST: Final = "test_host_growth test_check_placement"
_FORCED: Final = "test_forced test_check_placement"
_BOUND: Final = "test_vllm_bounds test_import_vllm"
_HERE: Final = "test_surroundings test_cards_here serving/test_check"
_DOMAIN: Final = "test_domains test_store"

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
    Mutant("needed.total_bytes, reserve, (top,), growth", "needed.total_bytes, reserve, (needed.total_bytes,), growth", _PAGE),
    Mutant("found = furthest if furthest + 1 == fitting else None", "found = furthest", "test_layout"),
    # host memory beside the GPU, and what servers come to take of it
    Mutant("CACHE_RAM: Final = 8192 * MIB", "CACHE_RAM: Final = 4096 * MIB", _HOST),
    Mutant("CHECKPOINTS: Final = 32", "CHECKPOINTS: Final = 8", _HOST),
    Mutant("return cache + count * (needed.fixed_cache_bytes or 0)", "return cache", _HOST),
    Mutant('unlimited if size.startswith("-") else CACHE_RAM', "CACHE_RAM", _HOST),
    Mutant("left < growth + before)", "left < growth)", _HOST),
    Mutant("(verdict.margin_bytes or 0) - (verdict.uncertainty_bytes or 0)", "(verdict.margin_bytes or 0)", _HOST),
    Mutant('"offload" if left < 0 else', '"offload" if left <= 0 else', _HOST),
    Mutant("growth=self.growth + growth)", "growth=growth)", _HOST),
    Mutant("+ moved + (needed.compute_bytes or 0 if moved else 0) + asked", "+ moved + asked", _HOST),
    Mutant("(needed.compute_bytes or 0 if moved else 0) + asked", "(needed.compute_bytes or 0 if moved else 0)", _HOST),
    Mutant("max(self.available - taken, 0)", "self.available", _HOST),
    Mutant("(min(free[0], host.available),)", "free", _HOST),
    Mutant("sum(one.host_required_bytes or 0 for one in some)", "0", _HOST),
    Mutant('zip(judged, fates, strict=True) if fate != "evicted")', "zip(judged, fates, strict=True))", _HOST),
    # placements that are asked for
    Mutant('"fits" if margin >= held.doubt else "offload"', '"fits" if margin >= 0 else "offload"', _FORCED),
    Mutant("out_of_memory=margin < held.doubt", "out_of_memory=margin < 0", _FORCED),
    Mutant("tight=-held.doubt <= margin < held.doubt", "tight=0 <= margin < held.doubt", _FORCED),
    Mutant("work = max(work, compute.without_experts())", "work = work", _FORCED),
    Mutant("SPLIT_ERROR: Final = 0.05", "SPLIT_ERROR: Final = 0.0", _FORCED),
    Mutant("(0.0 if placement.layers_gb else max(layers.dense))", "0.0", _FORCED),
    Mutant("held.required + held.doubt <= free", "held.required <= free", _FORCED),
    Mutant('{title} {calibration.metadata.engine.version} decides what it keeps free")', '")', _FORCED),
    Mutant("if len(cards) != 1:", "if len(cards) > 2:", _FORCED),
    # bounds of what logs do not say
    Mutant("(above - below) / (whole - short.context)", "(most - below) / (whole - short.context)", _BOUND),
    Mutant("most - slope * short.context * most / below", "below - slope * short.context", _BOUND),
    Mutant("fixed + slope * long.context > (1 + _ROUNDED) * most", "False", _BOUND),
    Mutant("<= (1 + LINE_ABOVE) * most else None", "<= 9 * most else None", _BOUND),
    Mutant("(metadata.quality.valid_to if blocks.bound else blocks.size)", "blocks.size", _BOUND),
    Mutant("kv > room >= _least(calibration, blocks, context, concurrency)", "False", _BOUND),
    Mutant("at_most=needed.at_most", "at_most=False", _BOUND),
    # settings of a server here, slots, and the GPU that was asked for
    Mutant("int(slots) > (asked.num_parallel or 1)", "int(slots) > 99", _HERE),
    Mutant("not (asked.placed and name in policy.placing_variables)", "not asked.placed", _HERE),
    Mutant("if getattr(asked, field) is None and", "if", _HERE),
    Mutant("env.get(name) and env[name] != own.env.get(name) and", "env.get(name) and", _HERE),
    Mutant("if not served or name not in policy.verdict_variables}", "}", _HERE),
    Mutant(
        "available is not None and not machine.names_gpu:\n        return True",
        "available is not None:\n        return True",
        _HERE,
    ),
    Mutant("on_host and machine.names_gpu", "False", _HERE),
    Mutant("if num_parallel > self.max_slots:", "if num_parallel >= self.max_slots:", "cli/test_check"),
    Mutant("max_slots: ClassVar[int] = 256", "max_slots: ClassVar[int] = 257", "cli/test_check"),
    Mutant(
        'one.fate == "evicted" for one in models) and worst == "fits"', 'False for one in models) and worst == "fits"', _HERE
    ),
    # what a file may say
    Mutant("_OFF_LINE: Final = 0.02", "_OFF_LINE: Final = 0.2", _DOMAIN),
    Mutant("_OFF_LINE_GB: Final = 0.016", "_OFF_LINE_GB: Final = 0.16", _DOMAIN),
    Mutant("_OF_A_CARD: Final = 0.1", "_OF_A_CARD: Final = 1.0", _DOMAIN),
    Mutant("_SUMMED: Final = 1e-5", "_SUMMED: Final = 1.0", _DOMAIN),
    Mutant("from_gib(recorded) < own - MIB", "from_gib(recorded) < 0", _DOMAIN),
    Mutant("_LONGEST: Final = 1 << 14", "_LONGEST: Final = 1 << 20", _DOMAIN),
    Mutant("return engine.image_digest is not None and repository(", "return repository(", "test_trust"),
    Mutant("if own is not None and own not in (name, named):", "if False:", "test_trust"),
)
