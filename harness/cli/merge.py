"""``harness merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from harness.cli.context import command, store_at
from harness.cli.options import allowed_of, store_option, trust_options
from harness.cli.output import Output
from harness.text import clean

#: Exit status where something here would have been overwritten.
CONFLICT: Final = 73
#: Exit status where something was not taken because of what it asks for.
REFUSED: Final = 77


@click.command()
@click.argument("sources", metavar="DIR...", nargs=-1, required=True)
@click.option("--newer", is_flag=True, help="Where two disagree, take the newer one.")
@trust_options
@store_option
@command
def cli(sources: tuple[str, ...], newer: bool, store: str | None, output: Output, **given: Any) -> None:
    """Merge stores of other machines into this one, without loss.

    Calibrations of another GPU or other settings become variants. Of two that ought to agree, the newer one stays
    where they do; where they do not, the one here stays, the difference is shown, and the status is 73.
    One that asks for what a file may not set (a program's environment, an image) is not taken; the status is 77.
    """
    from harness.render.drift import percent, show
    from harness.sweep.merge import merge

    found = list(merge(store_at(store), [Path(source) for source in sources], newer=newer, allowed=allowed_of(given)))
    conflicts = [one for one in found if one.action == "conflict"]
    if not output.as_json:
        for one in found:
            where = clean(f"{one.source} -> {one.target}" if one.target else one.source)
            click.echo(f"{one.action:>10}  {where}{f'  ({clean(one.reason)})' if one.reason else ''}")
            if one.action == "conflict" and one.drift is not None:
                for figure in one.drift.moved:
                    moved = f"{show(figure.old)} → {show(figure.new)} {percent(figure)}".rstrip()
                    click.echo(f"{'':>12}{clean(figure.name)}: {moved}")
        if conflicts:
            click.echo("nothing here was overwritten; harness diff shows more, --newer takes the newer one")
    data = [
        {
            "source": one.source,
            "target": one.target,
            "action": one.action,
            "reason": one.reason,
            "moved": [figure.name for figure in one.drift.moved] if one.drift else [],
        }
        for one in found
    ]
    refused = any(one.action == "refused" for one in found)
    output.done({"calibrations": data}, CONFLICT if conflicts else REFUSED if refused else 0)
