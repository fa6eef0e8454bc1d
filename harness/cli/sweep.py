"""``harness sweep``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from harness.cli.context import as_json, command, store_at
from harness.cli.options import allowed_of, store_option, trust_options
from harness.cli.output import CommandResult
from harness.text import clean

if TYPE_CHECKING:
    from harness.sweep.matrix import Cell
    from harness.sweep.run import CellOutcome, Sweep


@click.command()
@click.argument("plan", metavar="PLAN.yaml")
@click.option("--ray", "address", metavar="ADDRESS|auto", help="Run the cells on a Ray cluster.")
@click.option("--resume", is_flag=True, help="Skip finished cells, and run failed ones again.")
@click.option("--dry-run", is_flag=True, help="List the cells, and how long they may take.")
@click.option("--allow-binary", is_flag=True, help="Run the program that the plan names as an engine.")
@trust_options
@store_option
@command
def cli(plan: str, address: str | None, resume: bool, dry_run: bool, store: str | None, **given: Any) -> CommandResult:
    """Calibrate every cell of a plan: models × engines × settings, here or on a Ray cluster.

    Ends with 0 if every cell is done, else with the status of the first one that failed.
    """
    from harness.sweep.run import Sweep, one_after_another, refuse_cells, run_sweep

    shelf = store_at(store)
    sweep = Sweep(Path(plan), shelf, here=address is None)
    cells = sweep.pending(resume=resume)
    from harness.cli.progress import watcher
    from harness.sweep.untrusted import refuse_plan

    refuse_plan(cells, Path.cwd(), allowed_of(given), plan)
    if dry_run:
        if address is None:
            refuse_cells(cells, shelf, Path.cwd())
        return _dry_run(sweep, cells)
    with watcher(quiet=as_json()) as watch:
        if address is None:
            runner = one_after_another(shelf, Path.cwd(), watch)
        else:
            from harness.sweep.ray import on_cluster

            runner = on_cluster(address, shelf)
        outcomes = run_sweep(sweep, cells, runner, watch)
    return _summary(sweep, outcomes)


def _dry_run(sweep: Sweep, cells: tuple[Cell, ...]) -> CommandResult:
    from harness.render.sweep import planned
    from harness.sweep.matrix import loads_of

    loads, seconds = sum(loads_of(cell) for cell in cells), sweep.estimate(cells)
    return CommandResult(
        data={
            "cells": msgspec.to_builtins([cell.public() for cell in cells]),
            "total": len(sweep.cells),
            "loads": loads,
            "estimated_seconds": seconds,
        },
        text=partial(planned, [cell.title for cell in cells], len(sweep.cells), loads, seconds),
    )


def _summary(sweep: Sweep, outcomes: tuple[CellOutcome, ...]) -> CommandResult:
    from harness.render.sweep import summary

    failed = [(one.cell.title, one.problem) for one in outcomes if one.problem is not None]
    return CommandResult(
        data={
            "cells": msgspec.to_builtins([msgspec.structs.replace(one, cell=one.cell.public()) for one in outcomes]),
            "total": len(sweep.cells),
            "failed": len(failed),
        },
        text=partial(summary, failed, len(outcomes), len(sweep.cells)),
        exit_code=failed[0][1].exit_code if failed else 0,
        errors=tuple(
            {"code": problem.code, "message": clean(f"{title}: {problem.message}"), "hint": problem.hint}
            for title, problem in failed
        ),
    )
