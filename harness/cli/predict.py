"""``harness predict``."""

from __future__ import annotations

import click

from harness.cli.context import command, engine_option, store_at, store_option
from harness.cli.output import Output
from harness.cli.select import select
from harness.core.predict import predict


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@click.option("--ctx", required=True, type=click.IntRange(min=1, max=1 << 31), help="Tokens per slot.")
@click.option("--num-parallel", type=click.IntRange(1, 4096), default=1, show_default=True, help="Slots.")
@click.option("--variant", metavar="NAME")
@engine_option
@store_option
@command
def cli(
    model: str, ctx: int, num_parallel: int, variant: str | None, engine: str | None, store: str | None, output: Output
) -> None:
    """Memory and speed of a calibrated MODEL at a context."""
    calibration = select(store_at(store), model, engine, variant)
    prediction = predict(calibration, ctx, num_parallel)
    for text in prediction.warnings:
        output.warn(text)
    if not output.as_json:
        from harness.cli.tables import console, prediction_table

        slots = f" × {num_parallel} slots" if num_parallel > 1 else ""
        console().print(prediction_table(prediction, f"{calibration.id} at {ctx:,} tokens{slots}"))
        speed = prediction.speed
        if speed.decode_tokens_per_s:
            deep = speed.decode_at_depth_tokens_per_s
            click.echo(
                f"decode {speed.decode_tokens_per_s:.1f} tokens/s" + (f", about {deep:.1f} with a full context" if deep else "")
            )
    output.done(prediction.to_json())
