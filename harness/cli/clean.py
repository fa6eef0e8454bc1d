"""``harness clean``."""

from __future__ import annotations

from functools import partial

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import CommandResult
from harness.render.machine import leftovers


@click.command()
@click.option("--yes", is_flag=True, help="Remove what is abandoned; without it, it is only listed.")
@store_option
@command
def cli(yes: bool, store: str | None) -> CommandResult:
    """List what harness has left here, and with --yes remove orphaned resources.

    Only containers and volumes with harness's own label, and half-written files of the store, are looked at.
    """
    from harness.maintain import clean as workflow

    survey = workflow.clean(store_at(store).root, remove_abandoned=yes)
    return CommandResult(data=msgspec.to_builtins(survey), text=partial(leftovers, survey, removed=yes))
