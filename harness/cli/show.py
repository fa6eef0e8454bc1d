"""``harness show``."""

from __future__ import annotations

import click

from harness.cli.context import command, engine_option, store_at, store_option
from harness.cli.output import Output
from harness.cli.select import select
from harness.model.calibration import to_document


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@click.option("--variant", metavar="NAME")
@engine_option
@store_option
@command
def cli(model: str, variant: str | None, engine: str | None, store: str | None, output: Output) -> None:
    """One calibration: constants, parts, quality, speeds."""
    calibration = select(store_at(store), model, engine, variant)
    if not output.as_json:
        from harness.render.tables import calibration_panel, console

        console().print(calibration_panel(calibration, calibration.id))
    output.done({"calibration": to_document(calibration)})
