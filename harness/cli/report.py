"""``harness report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import CommandResult, warn
from harness.text import clean

if TYPE_CHECKING:
    from harness.report.page import DriftLine


@click.command()
@click.option(
    "--output", "-o", "target", default="report.html", show_default=True, metavar="FILE", help="Where to write the page."
)
@click.option("--against", metavar="STORE", help="Also show what moved since STORE (as `harness diff` reads it).")
@store_option
@command
def cli(target: str, against: str | None, store: str | None) -> CommandResult:
    """All calibrations as one page for a browser: constants, charts, and a planner that answers as `check` does.

    The page needs no network and sends nothing anywhere.
    """
    from harness.report.build import drift_lines, write_report

    shelf = store_at(store)
    drift: tuple[DriftLine, ...] = ()
    if against is not None:
        from harness.maintain.diff import pairs, read_side
        from harness.render.drift import described

        drift = drift_lines(pairs(read_side(against), read_side(str(shelf.root))), described)
    shown = write_report(shelf, Path(target), warn, drift=drift, against=against)
    said = f"written  {clean(target)}  ({shown} calibration{'' if shown == 1 else 's'})"
    return CommandResult(data={"report": target, "calibrations": shown}, text=lambda: [said])
