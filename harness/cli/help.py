"""``harness help``."""

from __future__ import annotations

import click

from harness.cli.output import CommandResult
from harness.errors import UsageError
from harness.render.tables import Verbatim


@click.command()
@click.argument("verb", required=False)
@click.pass_context
def cli(context: click.Context, verb: str | None) -> CommandResult:
    """Help of VERB, or of harness."""
    root = context.find_root()
    group = root.command
    assert isinstance(group, click.Group)  # noqa: S101 - harness is a group of verbs
    command = group if verb is None else group.get_command(root, verb)
    if command is None:
        return CommandResult(command="help", failure=UsageError(f"no such verb: {verb}", hint="harness help"))
    about = root if verb is None else click.Context(command, info_name=verb, parent=root, **command.context_settings)
    return CommandResult(command="help", text=lambda: [Verbatim(command.get_help(about))])
