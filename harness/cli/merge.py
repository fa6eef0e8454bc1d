"""``harness merge``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import allowed_of, store_option, trust_options
from harness.cli.output import CommandResult

#: Exit status where something here would have been overwritten.
CONFLICT: Final = 73
#: Exit status where something was not taken because of what it asks for.
REFUSED: Final = 77


@click.command()
@click.argument("sources", metavar="DIR...", nargs=-1, required=True)
@click.option("--newer", is_flag=True, help="Where two disagree, take the newer one.")
@click.option(
    "--trust",
    type=click.Choice(["card", "kind"]),
    help="The sources are shared calibrations: take those of the same card, or also of the same kind of card, where there is "
    "none of one's own.",
)
@click.option("--gpu-name", multiple=True, metavar="NAME", help="With --trust: a card, instead of reading this machine's.")
@trust_options
@store_option
@command
def cli(
    sources: tuple[str, ...], newer: bool, trust: Any, gpu_name: tuple[str, ...], store: str | None, **given: Any
) -> CommandResult:
    """Merge stores of other machines into this one, without loss.

    Calibrations of another GPU or other settings become variants. Of two that ought to agree, the newer one stays
    where they do; where they do not, the one here stays, the difference is shown, and the status is 73.
    One that asks for what a file may not set (a program's environment, an image) is not taken; the status is 77.
    """
    if trust is not None:
        return _shared(sources, store, trust, gpu_name, given)
    from harness.render.drift import merged_text
    from harness.sweep.merge import merge

    found = list(merge(store_at(store), [Path(source) for source in sources], newer=newer, allowed=allowed_of(given)))
    actions = {one.action for one in found}
    data = [
        {
            "source": one.source,
            "target": one.target,
            "action": one.action,
            "reason": one.reason,
            "moved": [figure.name for figure in one.drift.moved] if one.drift else [],
        }
        for one in found
    ]
    return CommandResult(
        data={"calibrations": data},
        text=partial(merged_text, found),
        exit_code=CONFLICT if "conflict" in actions else REFUSED if "refused" in actions else 0,
    )


def _shared(
    sources: tuple[str, ...], store: str | None, trust: Any, cards: tuple[str, ...], given: dict[str, Any]
) -> CommandResult:
    from harness.inventory.machine import LocalMachine
    from harness.maintain.community import take
    from harness.render.community import taken_text

    if not cards:
        here = LocalMachine().nvidia
        cards = () if isinstance(here, Exception) else tuple(gpu.name for gpu in here)
    paths = [Path(source) for source in sources]
    found = list(take(store_at(store), paths, cards, trust, Path.cwd(), allowed_of(given)))
    return CommandResult(
        data={"calibrations": msgspec.to_builtins(found)},
        text=partial(taken_text, found),
        exit_code=REFUSED if any(one.action == "refused" for one in found) else 0,
    )
