"""``harness show``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import CommandResult
from harness.cli.select import select
from harness.model.calibration import to_document
from harness.options import QueryOptions
from harness.render import calibrations
from harness.store.store import key_of
from harness.store.yaml import read_calibration


@click.command()
@click.argument("model", metavar="MODEL[@VARIANT]", envvar="HARNESS_MODEL")
@query_options("variant", "engine")
@store_option
@command
def cli(model: str, store: str | None, **given: Any) -> CommandResult:
    """One calibration: constants, parts, quality, speeds. MODEL is a name, an id, or the path of an artifact."""
    path = Path(model)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        calibration = read_calibration(path)
        key = key_of(calibration, path)
    else:
        key, calibration = select(store_at(store), model, QueryOptions.of(given))
    return CommandResult(data={"calibration": to_document(calibration)}, text=partial(calibrations.shown, calibration, key))
