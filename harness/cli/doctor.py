"""``harness doctor``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click
import msgspec

from harness.cli.context import as_json, command, store_at
from harness.cli.options import run_options, store_option
from harness.cli.output import CommandResult
from harness.render import machine


@click.command()
@click.option("--measure-overhead", is_flag=True, help="Measure the driver's overhead on a GPU (a minute).")
@run_options(
    "gpus", "engine_binary",
    gpus={"envvar": None, "metavar": "ID", "help": "The GPU whose overhead is measured."},
    engine_binary="Measure it with your own llama-server.",
)  # fmt: skip
@store_option
@command
def cli(measure_overhead: bool, gpus: str, engine_binary: str | None, store: str | None) -> CommandResult:
    """What works here, what does not, and why; and where each setting comes from.

    With --measure-overhead: what the driver takes on this GPU beyond what an engine logs, so that calibrations of other
    GPUs can be used on it.
    """
    if measure_overhead:
        return _measure(gpus, engine_binary, store)
    from harness.maintain.doctor import examine, readiness
    from harness.store.config import settings

    findings, ready = examine(store_at(store).root), readiness(store_at(store), Path.cwd())
    found = settings(dict(os.environ), Path.cwd())
    return CommandResult(
        data={
            "ready": msgspec.to_builtins(ready),
            "findings": msgspec.to_builtins(findings),
            "settings": {key: {"value": value, "from": origin} for key, (value, origin) in found.items()},
        },
        text=partial(machine.findings, ready, findings, found),
    )


def _measure(gpus: str, binary: str | None, store: str | None) -> CommandResult:
    from harness.cli.progress import watcher
    from harness.maintain.measure_overhead import measure_overhead

    with watcher(quiet=as_json()) as watch:
        found = measure_overhead(store_at(store), Path.cwd(), watch, gpus=gpus, binary=binary)
    return CommandResult(data={"overhead": msgspec.to_builtins(found)}, text=partial(machine.overhead, found))
