"""``harness predict``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import CommandResult
from harness.cli.select import select
from harness.model.calibration import Calibration
from harness.options import QueryOptions
from harness.prediction.memory import Prediction, predict
from harness.render.prediction import prediction_text


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@query_options(
    "ctx", "num_parallel", "available", "variant", "engine",
    ctx={"required": True, "help": "Tokens per slot."}, available="Say also how fast it is with so much memory free.",
)  # fmt: skip
@store_option
@command
def cli(model: str, store: str | None, **given: Any) -> CommandResult:
    """Memory and speed of a calibrated MODEL at a context."""
    query = QueryOptions.of(given)
    calibration = select(store_at(store), model, query)
    prediction = predict(calibration, given["ctx"], query.num_parallel)
    with_memory = None if query.available is None else _with_memory(calibration, prediction, query.available)
    return CommandResult(
        data={**prediction.to_json(), **({} if with_memory is None else {"with_available": with_memory})},
        text=partial(prediction_text, prediction, calibration.id, with_memory),
        warnings=prediction.warnings,
    )


def _with_memory(calibration: Calibration, prediction: Prediction, available: tuple[int, ...]) -> dict[str, object]:
    """The verdict with so much memory free: layers on the GPU and the speed that is left."""
    from harness.engines.registry import policy_of
    from harness.prediction.verdict import judge

    rules = policy_of(calibration.engine)
    verdict = judge(calibration, prediction.context, prediction.num_parallel, available, rules, extrapolate=True)
    fields = ("verdict", "available_bytes", "layers_total", "layers_offloaded", "layers_overflowing", "decode_tokens_per_s")
    return {field: getattr(verdict, field) for field in fields}
