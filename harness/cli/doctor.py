"""``harness doctor``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import run_options, store_option
from harness.cli.output import Output
from harness.text import clean

_MARKS: Final = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("not there", "red")}


@click.command()
@click.option("--measure-overhead", is_flag=True, help="Measure what the driver takes on a GPU (a minute).")
@run_options(
    "gpus", "engine_binary",
    gpus={"envvar": None, "metavar": "ID", "help": "The GPU whose overhead is measured."},
    engine_binary="Measure it with your own llama-server.",
)  # fmt: skip
@store_option
@command
def cli(measure_overhead: bool, gpus: str, engine_binary: str | None, store: str | None, output: Output) -> None:
    """What works here, what does not, and why; and where each setting comes from.

    With --measure-overhead: what the driver takes on this GPU beyond what an engine logs, so that calibrations of other
    GPUs can be used on it.
    """
    if measure_overhead:
        _measure(gpus, engine_binary, store, output)
    from harness.maintain.doctor import examine
    from harness.store.config import settings

    findings = examine(store_at(store).root)
    found = settings(dict(os.environ), Path.cwd())
    if not output.as_json:
        for finding in findings:
            word, colour = _MARKS[finding.state]
            click.echo(f"{click.style(f'{word:>9}', fg=colour)}  {finding.subject}: {clean(finding.text)}")
            if finding.hint:
                click.echo(f"{'':>9}  {click.style(clean(finding.hint), dim=True)}")
        for key, (value, origin) in sorted(found.items()):
            click.echo(f"  setting  {key} = {clean(str(value))}  ({clean(origin)})")
    output.done(
        {
            "findings": msgspec.to_builtins(findings),
            "settings": {key: {"value": value, "from": origin} for key, (value, origin) in found.items()},
        }
    )


def _measure(gpus: str, binary: str | None, store: str | None, output: Output) -> None:
    from harness.cli.progress import watcher
    from harness.serving.driver_overhead import measure_overhead

    with watcher(quiet=output.as_json) as watch:
        found = measure_overhead(store_at(store), Path.cwd(), watch, gpus=gpus, binary=binary)
    if not output.as_json:
        click.echo(f"{clean(found.gpu)}: the driver takes {found.overhead_gb:.3f} GiB beyond what {clean(found.engine)} logs")
    output.done({"overhead": msgspec.to_builtins(found)})
