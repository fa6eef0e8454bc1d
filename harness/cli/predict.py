"""``harness predict``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import PLACING, filter_options, query_options, store_option
from harness.cli.output import CommandResult
from harness.cli.select import select_or_estimate
from harness.engines.registry import policy_of
from harness.errors import UnknownVerdictError
from harness.model.calibration import Calibration
from harness.options import QueryOptions
from harness.prediction.forced import NOTHING, Forced
from harness.prediction.memory import Prediction, predict
from harness.render.prediction import prediction_text


@click.command()
@click.argument("model", metavar="MODEL[@CTX]", envvar="HARNESS_MODEL")
@query_options(
    "ctx", "num_parallel", "available", "measured_only", *PLACING,
    available="Also print the speed with this much free memory.",
)  # fmt: skip
@filter_options
@store_option
@command
def cli(model: str, store: str | None, **given: Any) -> CommandResult:
    """Memory and speed of a calibrated MODEL at a context; of a file or an address without a calibration an estimate."""
    from harness.serving.calibration_lookup import CalibrationFilter, read_question

    query = QueryOptions.of(given)
    asked = read_question(model, query.ctx, query.num_parallel)
    query = msgspec.structs.replace(query, ctx=asked.context)
    key, calibration, source, notes = select_or_estimate(store_at(store), asked.model, query)
    prediction = msgspec.structs.replace(predict(calibration, asked.context, query.num_parallel), source=source)
    forced = CalibrationFilter.of(query).forced
    placed = query.available is not None or query.host_available is not None or forced != NOTHING
    with_memory = _with_memory(calibration, prediction, query, forced) if placed else None
    title = key + {"measured": "", "derived": " (derived)"}.get(source, " (estimated)")
    return CommandResult(
        data={**prediction.to_json(), **({} if with_memory is None else {"with_available": with_memory})},
        text=partial(prediction_text, prediction, title, with_memory),
        warnings=(*notes, *prediction.warnings),
    )


def _with_memory(calibration: Calibration, prediction: Prediction, query: QueryOptions, forced: Forced) -> dict[str, object]:
    """The verdict with so much memory free, or with more than enough: layers on the GPU and the speed that is left."""
    from harness.inventory.machine import LocalMachine
    from harness.prediction.forced import judge_as_asked
    from harness.prediction.host import with_host
    from harness.serving.calibration_lookup import as_given
    from harness.serving.surroundings import environment_of

    available = as_given(calibration, query.available, query.host_available)
    verdict = judge_as_asked(
        calibration, prediction.context, prediction.num_parallel, available or (1 << 50,), policy_of(calibration.engine),
        forced, extrapolate=True, env=environment_of(calibration, LocalMachine(query.gpu)),
    )  # fmt: skip
    if verdict.verdict == "unknown" and forced != NOTHING:
        raise UnknownVerdictError(verdict.reason or "unknown")
    if available is not None or verdict.basis == "gpu":
        verdict = with_host(verdict, query.host_available)
    fields = ("verdict", "available_bytes", "layers_total", "layers_offloaded", "layers_overflowing", "decode_tokens_per_s")
    host = ("host_required_bytes", "host_available_bytes", "host_short_bytes", "host_growth_bytes")
    more = ("required_bytes", *host, "tight", "forced", "out_of_memory", "at_most", "reason")
    found = {field: getattr(verdict, field) for field in (*fields, *more)}
    return found if available is not None else {**found, "verdict": None, "available_bytes": None, "out_of_memory": None}
