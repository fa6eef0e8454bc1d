"""``harness fit``."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import CommandResult
from harness.model.calibration import to_document
from harness.options import Allowed
from harness.render.tables import Verbatim
from harness.text import clean


@click.command()
@click.argument("run")
@click.option("--output", "-o", "target", metavar="FILE", help="Write the artifact here instead of showing it.")
@click.option("--allow-env", multiple=True, metavar="NAME", help="Keep this variable of the record, whatever it does.")
@store_option
@command
def cli(run: str, target: str | None, allow_env: tuple[str, ...], store: str | None) -> CommandResult:
    """Build the artifact again from RUN: a run's name, folder or record.json."""
    from harness.maintain.refit import refit
    from harness.store.store import write_atomically
    from harness.store.yaml import to_yaml

    folder = Path(run)
    if not folder.exists():
        folder = store_at(store).run_folder(folder.name)
    from harness.store.trust import refused_variables, require

    _, calibration = refit(folder)
    require(refused_variables(calibration.metadata.settings.env), Allowed(env=frozenset(allow_env)), clean(run))
    artifact = to_yaml(calibration)
    if target is not None:
        write_atomically(Path(target), artifact.encode())
    shown = Verbatim(artifact.removesuffix("\n") if target is None else f"written  {clean(target)}")
    return CommandResult(data={"calibration": to_document(calibration)}, text=lambda: [shown])
