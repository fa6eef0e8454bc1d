"""``harness predict``."""

from __future__ import annotations

from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import Output
from harness.cli.select import select
from harness.model.calibration import Calibration
from harness.options import QueryOptions
from harness.prediction.memory import Prediction, predict


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@query_options(
    "ctx", "num_parallel", "available", "variant", "engine",
    ctx={"required": True, "help": "Tokens per slot."}, available="Say also how fast it is with so much memory free.",
)  # fmt: skip
@store_option
@command
def cli(model: str, store: str | None, output: Output, **given: Any) -> None:
    """Memory and speed of a calibrated MODEL at a context."""
    query = QueryOptions.of(given)
    calibration = select(store_at(store), model, query)
    prediction = predict(calibration, given["ctx"], query.num_parallel)
    for text in prediction.warnings:
        output.warn(text)
    with_memory = None if query.available is None else _with_memory(calibration, prediction, query.available)
    if not output.as_json:
        from harness.render.tables import console, prediction_table

        slots = f" × {query.num_parallel} slots" if query.num_parallel > 1 else ""
        console().print(prediction_table(prediction, f"{calibration.id} at {prediction.context:,} tokens{slots}"))
        for line in _speeds(prediction):
            click.echo(line)
        if with_memory is not None:
            click.echo(_sentence(with_memory))
    output.done({**prediction.to_json(), **({} if with_memory is None else {"with_available": with_memory})})


def _speeds(prediction: Prediction) -> list[str]:
    speed, spread = prediction.speed, f"± {prediction.speed.uncertainty:.0%}"
    lines = []
    if speed.decode_tokens_per_s:
        deep = speed.decode_at_depth_tokens_per_s
        lines.append(
            f"decode {speed.decode_tokens_per_s:.1f} tokens/s {spread}"
            + (f", about {deep:.1f} when the context is full" if deep else "")
        )
    if speed.prompt_tokens_per_s:
        lines.append(f"prompt {speed.prompt_tokens_per_s:.1f} tokens/s {spread}")
    return lines


def _with_memory(calibration: Calibration, prediction: Prediction, available: tuple[int, ...]) -> dict[str, object]:
    """The verdict with so much memory free: layers on the GPU and the speed that is left."""
    from harness.engines.registry import policy_of
    from harness.prediction.verdict import judge

    rules = policy_of(calibration.engine)
    verdict = judge(calibration, prediction.context, prediction.num_parallel, available, rules, extrapolate=True)
    fields = ("verdict", "available_bytes", "layers_total", "layers_offloaded", "layers_overflowing", "decode_tokens_per_s")
    return {field: getattr(verdict, field) for field in fields}


def _sentence(found: dict[str, object]) -> str:
    from harness.units import format_size

    size = found["available_bytes"]
    free = f"with {format_size(size, 1)} free" if isinstance(size, int) else "with that memory"
    if found["verdict"] == "unknown":
        return f"{free}: not known"
    layers, total, speed = found["layers_offloaded"], found["layers_total"], found["decode_tokens_per_s"]
    where = "everything fits" if found["verdict"] == "fits" else f"{layers} of {total} layers stay on the GPU"
    return f"{free}: {where}" + (f", about {speed:.1f} tokens/s" if isinstance(speed, float) else "")
