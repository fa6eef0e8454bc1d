"""``harness clean``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import Output
from harness.text import clean

if TYPE_CHECKING:
    from harness.maintain.clean import Survey


@click.command()
@click.option("--yes", is_flag=True, help="Remove what is abandoned; without it, it is only listed.")
@store_option
@command
def cli(yes: bool, store: str | None, output: Output) -> None:
    """List what harness has left here, and with --yes remove what nobody owns any more.

    Only containers and volumes with harness's own label, and half-written files of the store, are looked at.
    """
    from harness.maintain import clean as workflow

    survey = workflow.clean(store_at(store).root, remove_abandoned=yes)
    if not output.as_json:
        _show(survey, yes)
    output.done(msgspec.to_builtins(survey))


def _show(survey: Survey, yes: bool) -> None:
    for item in survey.items:
        word = "removed" if item.removed else item.state.replace("-", " ")
        click.echo(f"{word:>9}  {item.kind} {clean(item.name)}")
        click.echo(f"{'':>9}  {click.style(clean(item.why), dim=True)}")
    if survey.docker is not None:
        click.echo(f"no containers were looked for: {clean(survey.docker)}")
    abandoned = sum(item.state == "abandoned" for item in survey.items)
    if not survey.items:
        click.echo("nothing of harness is left here")
    elif abandoned and not yes:
        click.echo(f"nothing was removed; harness clean --yes removes what is abandoned ({abandoned})")
