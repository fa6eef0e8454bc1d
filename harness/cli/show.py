"""``harness show``."""

from __future__ import annotations

from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import Output
from harness.cli.select import select
from harness.model.calibration import to_document
from harness.options import QueryOptions


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@query_options("variant", "engine")
@store_option
@command
def cli(model: str, store: str | None, output: Output, **given: Any) -> None:
    """One calibration: constants, parts, quality, speeds."""
    calibration = select(store_at(store), model, QueryOptions.of(given))
    if not output.as_json:
        from harness.render.tables import calibration_panel, console

        console().print(calibration_panel(calibration, calibration.id))
    output.done({"calibration": to_document(calibration)})
