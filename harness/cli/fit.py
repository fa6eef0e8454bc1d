"""``harness fit``."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.context import command, store_at, store_option
from harness.cli.output import Output
from harness.model.calibration import to_document
from harness.text import clean


@click.command()
@click.argument("run")
@click.option("--output", "-o", "target", metavar="FILE", help="Write the artifact here instead of showing it.")
@store_option
@command
def cli(run: str, target: str | None, store: str | None, output: Output) -> None:
    """Build the artifact again from RUN: a run's name, folder or record.json."""
    from harness.maintain.refit import refit
    from harness.store.store import to_yaml, write_atomically

    folder = Path(run)
    if not folder.exists():
        folder = store_at(store).run_folder(folder.name)
    _, calibration = refit(folder)
    if target is not None:
        write_atomically(Path(target), to_yaml(calibration).encode())
        if not output.as_json:
            click.echo(f"written  {clean(target)}")
    elif not output.as_json:
        click.echo(to_yaml(calibration), nl=False)
    output.done({"calibration": to_document(calibration)})
