"""``harness sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import allowed_of, store_option, trust_options
from harness.cli.output import Output
from harness.text import clean

if TYPE_CHECKING:
    from harness.sweep.run import CellOutcome, Sweep


@click.command()
@click.argument("plan", metavar="PLAN.yaml")
@click.option("--ray", "address", metavar="ADDRESS|auto", help="Run the cells on a Ray cluster.")
@click.option("--resume", is_flag=True, help="Skip cells that are done, run failed ones again.")
@click.option("--dry-run", is_flag=True, help="List the cells, and how long they may take.")
@click.option("--allow-binary", is_flag=True, help="Run the program that the plan names as an engine.")
@trust_options
@store_option
@command
def cli(plan: str, address: str | None, resume: bool, dry_run: bool, store: str | None, output: Output, **given: Any) -> None:
    """Calibrate every cell of a plan: models × engines × settings, here or on a Ray cluster.

    Ends with 0 if every cell is done, else with the status of the first one that failed.
    """
    from harness.sweep.run import Sweep, one_after_another, run_sweep

    shelf = store_at(store)
    sweep = Sweep(Path(plan), shelf, here=address is None)
    cells = sweep.pending(resume=resume)
    if dry_run:
        _dry_run(sweep, cells, output)
    from harness.cli.progress import watcher
    from harness.sweep.untrusted import refuse_plan

    refuse_plan(cells, Path.cwd(), allowed_of(given), plan)
    with watcher(quiet=output.as_json) as watch:
        if address is None:
            runner = one_after_another(shelf, Path.cwd(), watch)
        else:
            from harness.sweep.ray import on_cluster

            runner = on_cluster(address, shelf)
        outcomes = run_sweep(sweep, cells, runner, watch)
    _summary(sweep, outcomes, output)


def _dry_run(sweep: Sweep, cells: tuple, output: Output) -> None:  # type: ignore[type-arg]
    from harness.sweep.matrix import loads_of

    loads, seconds = sum(loads_of(cell) for cell in cells), sweep.estimate(cells)
    if not output.as_json:
        for cell in cells:
            click.echo(f"  {clean(cell.title)}")
        spent = "how long is not known before one has run" if seconds is None else f"about {seconds / 60:.0f} minutes"
        click.echo(f"{len(cells)} of {len(sweep.cells)} cells, at least {loads} loads: {spent}")
    output.done(
        {
            "cells": msgspec.to_builtins([cell.public() for cell in cells]),
            "total": len(sweep.cells),
            "loads": loads,
            "estimated_seconds": seconds,
        }
    )


def _summary(sweep: Sweep, outcomes: tuple[CellOutcome, ...], output: Output) -> None:
    failed = [(one.cell, one.problem) for one in outcomes if one.problem is not None]
    if not output.as_json:
        skipped = len(sweep.cells) - len(outcomes)
        was = f", {skipped} were done before" if skipped else ""
        click.echo(f"{len(outcomes) - len(failed)} cells done, {len(failed)} failed{was}")
        for cell, problem in failed:
            click.echo(f"  {clean(cell.title)}\n    {clean(problem.message)}")
            if problem.hint:
                click.echo(f"    {clean(problem.hint)}")
        if failed:
            click.echo("run the failed ones again with --resume")
    errors = tuple(
        {"code": problem.code, "message": clean(f"{cell.title}: {problem.message}"), "hint": problem.hint}
        for cell, problem in failed
    )
    status = failed[0][1].exit_code if failed else 0
    output.done(
        {
            "cells": msgspec.to_builtins([msgspec.structs.replace(one, cell=one.cell.public()) for one in outcomes]),
            "total": len(sweep.cells),
            "failed": len(failed),
        },
        status,
        errors,
    )
