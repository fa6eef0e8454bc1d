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
@click.option("--cache", is_flag=True, help="With --yes: also weights in the cache, which are made again when needed.")
@click.option("--failed-runs", is_flag=True, help="With --yes: also runs that did not end well, with their logs.")
@store_option
@command
def cli(yes: bool, cache: bool, failed_runs: bool, store: str | None) -> CommandResult:
    """List what harness has left here, and with --yes remove orphaned resources.

    Only containers and volumes with harness's own label, and half-written files of the store, are looked at.
    """
    from harness.maintain import clean as workflow

    asked = {name for name, wanted in (("cache", cache), ("failed-runs", failed_runs)) if wanted}
    survey = workflow.clean(store_at(store).root, remove_abandoned=yes, asked=frozenset(asked))
    return CommandResult(data=msgspec.to_builtins(survey), text=partial(leftovers, survey, removed=yes))
