"""``harness list``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import CommandResult, warn
from harness.model.calibration import to_document
from harness.render import calibrations
from harness.text import written


@click.command("list")
@click.option("--catalog", is_flag=True, help="List the names that the catalog knows instead.")
@store_option
@command
def cli(catalog: bool, store: str | None) -> CommandResult:
    """All calibrations of the store."""
    if catalog:
        return _catalog()
    shelf = store_at(store)
    found = list(shelf.entries(warn))
    return CommandResult(
        data={
            "calibrations": [{**to_document(one.calibration), "path": str(one.path), "variant": one.variant} for one in found]
        },
        ids=tuple(written(one.key) for one in found),
        text=partial(calibrations.listing, [(one.key, one.calibration) for one in found], str(shelf.root)),
    )


def _catalog() -> CommandResult:
    from harness.store.catalog import find_catalog, read_catalog

    models = read_catalog(find_catalog(Path.cwd())).models
    engines = {name: entry.known_to() for name, entry in models.items()}
    return CommandResult(data={"catalog": sorted(models)}, text=partial(calibrations.catalog, engines))
