"""``harness calibrate``."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.context import as_json, command, context_of, store_at
from harness.cli.options import run_options, store_option
from harness.cli.output import CommandResult
from harness.errors import NotFoundError
from harness.options import RunOptions
from harness.store.store import key_of
from harness.text import written


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("model", metavar="[MODEL[@CTX]]", envvar="HARNESS_MODEL", required=False)
@run_options(engine="Engine that is measured; auto: Ollama where Docker gives it a GPU, else the embedded one.")
@run_options("force")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and start nothing.")
@store_option
@command
def cli(**given: Any) -> CommandResult:
    """Measure MODEL in a clean engine and write its calibration.

    MODEL is a name of the catalog, the engine's own name, or the path of a GGUF file.
    """
    from harness.measure.prepare import prepare

    if given["model"]:
        given["model"], context = context_of(given["model"], None)
        given["contexts"] = (context,) if context else given["contexts"]
    options, store = RunOptions.of(given), store_at(given["store"])
    try:
        session = prepare(options, store, Path.cwd())
    except NotFoundError as error:
        if options.model and (known := store.find(options.model)):
            again = shlex.quote(written(key_of(known[0][1], known[0][0])))
            error.hint = f"it is calibrated already; to measure it again: harness recalibrate {again}"
        raise
    from harness.cli.progress import watcher
    from harness.model.calibration import to_document
    from harness.render import calibrations

    watch = watcher(quiet=as_json())
    with watch:
        for reason in session.choice.reasons:
            watch.say(reason)
        if given["dry_run"]:
            planned = session.refuse()
            for note in planned.notes:
                watch.say(note)
            return CommandResult(
                data={"artifact": str(session.artifact), "loads": msgspec.to_builtins(planned.loads)},
                text=partial(calibrations.planned, session.request.name, planned.loads, str(session.artifact)),
            )
        done = session.calibrate(watch)
    key, path = key_of(done.calibration, done.artifact), _from_here(done.artifact)
    return CommandResult(
        data={
            "artifact": str(done.artifact),
            "record": str(done.record),
            "calibration": to_document(done.calibration),
            "seconds": {name: round(seconds, 3) for name, seconds in done.spent.items()},
        },
        ids=(written(key),),
        text=partial(calibrations.measured, done.calibration, key, path, done.spent),
    )


def _from_here(path: Path) -> str:
    """A path below the current folder as one from there, any other whole."""
    here = path.resolve()
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(path)
