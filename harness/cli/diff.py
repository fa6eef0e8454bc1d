"""``harness diff``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import CommandResult
from harness.render.drift import document, pairs_text

if TYPE_CHECKING:
    from harness.maintain.diff import Pair

#: Exit status of a drift beyond the measurement error.
DRIFTED: Final = 6


@click.command()
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
@click.option("--markdown", is_flag=True, help="Print the text of a pull request.")
@store_option
@command
def cli(old: str, new: str, markdown: bool, store: str | None) -> CommandResult:
    """What moved from A to B beyond the measurement error, and what that means.

    A and B are calibrations (names, ids or files), folders of them, or either at a git revision
    (HEAD~1:models/calibrations). Ends with 6 when something moved.
    """
    from harness.maintain.diff import pairs, read_side

    shelf = store_at(store)
    before, after = read_side(old, shelf), read_side(new, shelf)
    found = pairs(before, after)
    moved = any(pair.drift is not None and pair.drift.moved for pair in found)
    return CommandResult(
        data={"drifted": moved, "calibrations": [document(pair) for pair in found]},
        text=partial(_markdown, found) if markdown else partial(pairs_text, found, (before.name, after.name)),
        exit_code=DRIFTED if moved else 0,
    )


def _markdown(found: list[Pair]) -> Iterator[str]:
    from harness.render.drift_markdown import markdown

    yield markdown(found)
