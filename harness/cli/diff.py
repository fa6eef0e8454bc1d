"""``harness diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from harness.cli.context import command
from harness.cli.output import Output
from harness.prediction.drift import Drift, sentence
from harness.render.drift import effects_of, headline, percent, show, status_of
from harness.text import clean

if TYPE_CHECKING:
    from harness.maintain.diff import Pair

_WORDS: Final = {
    "moved": ("moved", "yellow"),
    "same": ("nothing beyond the measurement error", "green"),
    "untouched": ("the same measurement", "dim"),
    "added": ("added", "cyan"),
    "removed": ("removed", "red"),
}
#: Exit status of a drift beyond the measurement error.
DRIFTED: Final = 6


@click.command()
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
@click.option("--markdown", is_flag=True, help="Print the text of a pull request.")
@command
def cli(old: str, new: str, markdown: bool, output: Output) -> None:
    """What moved from A to B beyond the measurement error, and what that means.

    A and B are calibrations, folders of them, or either at a git revision (HEAD~1:models/calibrations). Ends with 6 when
    something moved.
    """
    from harness.maintain.diff import pairs, read_side

    before, after = read_side(old), read_side(new)
    found = pairs(before, after)
    if not output.as_json:
        if markdown:
            from harness.render.drift_markdown import markdown as render

            click.echo(render(found), nl=False)
        else:
            if not found:
                click.echo(f"no calibrations in {clean(before.name)} and {clean(after.name)}")
            show_pairs(found)
    moved = any(pair.drift is not None and pair.drift.moved for pair in found)
    output.done({"drifted": moved, "calibrations": [pair_json(pair) for pair in found]}, DRIFTED if moved else 0)


def pair_json(pair: Pair) -> dict[str, Any]:
    """One calibration of ``diff --json``: every figure with its tolerance, in the figure's own unit."""
    drift = pair.drift or Drift(figures=(), changes=())
    calibration = pair.new or pair.old
    return {
        "calibration": pair.key,
        "status": status_of(pair),
        "figures": [
            {
                "name": figure.name,
                "kind": figure.kind,
                "old": figure.old,
                "new": figure.new,
                "tolerance": figure.tolerance,
                "moved": figure.moved,
            }
            for figure in drift.figures
        ],
        "changes": [{"name": change.name, "old": change.old, "new": change.new} for change in drift.changes],
        "effects": [
            {
                "kind": effect.kind,
                "old": effect.old,
                "new": effect.new,
                "card_gb": effect.card_gb,
                "context": effect.context,
                "text": sentence([effect], calibration.metadata.machine.target if calibration else "gpu"),
            }
            for effect in drift.effects
        ],
    }


def show_pairs(found: list[Pair]) -> None:
    """Each calibration: what moved, by how much, and what that means."""
    from rich.table import Table
    from rich.text import Text

    from harness.render.tables import console

    shown = console()
    for pair in found:
        status = status_of(pair)
        word, colour = _WORDS[status]
        shown.print(Text.assemble((clean(pair.key), "bold"), "  ", (word, colour)))
        if pair.drift is None:
            continue
        for line in headline(pair.drift.changes):
            shown.print(Text(f"  {line}", style="dim"))
        if pair.drift.moved:
            table = Table(header_style="dim", box=None, padding=(0, 2, 0, 0))
            table.add_column("", no_wrap=True)
            for name in ("old", "new", "", "error"):
                table.add_column(name, justify="right")
            for figure in pair.drift.moved:
                error = "" if figure.tolerance is None else f"± {show(figure.tolerance)}"
                table.add_row(Text(f"  {clean(figure.name)}"), show(figure.old), show(figure.new), percent(figure), error)
            shown.print(table)
        for line in effects_of(pair):
            shown.print(Text(f"  {line}", style="bold"))
