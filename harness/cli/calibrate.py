"""``harness calibrate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import run_options, store_option
from harness.cli.output import Output
from harness.options import RunOptions
from harness.text import clean


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("model", envvar="HARNESS_MODEL", required=False)
@run_options(engine="")
@run_options("force")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@store_option
@command
def cli(output: Output, **given: Any) -> None:
    """Measure MODEL in a clean engine and write its calibration.

    MODEL is a name of the catalog, the engine's own name, or the path of a GGUF file.
    """
    from harness.measure.prepare import prepare

    options = RunOptions.of(given)
    store = store_at(given["store"])
    session = prepare(options, store, Path.cwd())
    from harness.cli.progress import watcher

    watch = watcher(quiet=output.as_json)
    with watch:
        for reason in session.choice.reasons:
            watch.say(reason)
        if given["dry_run"]:
            _dry_run(session, output)
        result = session.calibrate(watch)
    from harness.model.calibration import to_document

    if not output.as_json:
        _table(result)
    output.done(
        {
            "artifact": str(result.artifact),
            "record": str(result.record),
            "calibration": to_document(result.calibration),
        }
    )


def _dry_run(session: Any, output: Output) -> None:
    planned = session.plan()
    if not output.as_json:
        click.echo(f"would load {clean(session.request.name)}:")
        for load in planned.loads:
            batch = "the engine's batch" if load.num_batch is None else f"batch {load.num_batch}"
            click.echo(f"  {load.context:>7} tokens at {batch}")
        click.echo(f"and write {clean(str(planned.artifact))}")
    output.done({"artifact": str(planned.artifact), "loads": msgspec.to_builtins(planned.loads)})


def _table(result: Any) -> None:
    from harness.render.tables import calibration_panel, console

    shown = console()
    shown.print(calibration_panel(result.calibration, result.calibration.id))
    name = os.path.relpath(result.artifact)
    click.echo(f"written  {clean(name)}  ({result.seconds:.0f} s)")
    top = result.calibration.metadata.quality.valid_to
    click.echo(click.style("next     ", dim=True) + f"harness predict {clean(result.calibration.id)} --ctx {top}")
