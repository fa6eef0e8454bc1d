"""``harness show``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import CommandResult
from harness.cli.select import select
from harness.model.calibration import to_document
from harness.options import QueryOptions
from harness.render import calibrations


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@query_options("variant", "engine")
@store_option
@command
def cli(model: str, store: str | None, **given: Any) -> CommandResult:
    """One calibration: constants, parts, quality, speeds."""
    calibration = select(store_at(store), model, QueryOptions.of(given))
    return CommandResult(data={"calibration": to_document(calibration)}, text=partial(calibrations.shown, calibration))
