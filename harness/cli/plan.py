"""``harness plan``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import PLACING, filter_options, query_options, store_option
from harness.cli.output import CommandResult
from harness.options import QueryOptions


@click.command()
@click.argument("names", metavar="[MODEL[@CTX]]...", nargs=-1)
@query_options(
    "ctx", "num_parallel", "available", "gpu", "measured_only", *PLACING,
    ctx={"default": 8192, "show_default": True, "help": "Context of models put together."},
    available="A card with this much free memory, instead of this machine.",
    gpu="Plan for this GPU: an index, a UUID, or the engine's name of it.",
)  # fmt: skip
@click.option("--prefer", metavar="MODEL,...", help="Models that the sets should include, most important first.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@filter_options
@store_option
@command
def cli(names: tuple[str, ...], prefer: str | None, markdown: bool, store: str | None, **given: Any) -> CommandResult:
    """The largest context of every calibrated model that fits here, its speed, and which models fit together.

    Ends with 0 whatever fits: harness check has the verdict of one context as its status.
    """
    from harness.inventory.machine import LocalMachine
    from harness.render.capacity import plan_text
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.capacity import plan
    from harness.store.store import key_of
    from harness.text import written

    shelf, query = store_at(store), QueryOptions.of(given)
    found = plan(
        names, shelf, LocalMachine(query.gpu), wanted=CalibrationFilter.of(query, surroundings=True),
        num_parallel=query.num_parallel, context=given["ctx"], available=query.available, measured_only=query.measured_only,
        prefer=[one.strip() for one in (prefer or "").split(",") if one.strip()],
    )  # fmt: skip
    return CommandResult(
        data={"memories": [one.to_json() for one in found.memories]},
        text=partial(plan_text, found.memories, str(shelf.root), markdown=markdown, refused=bool(found.warnings)),
        warnings=found.warnings,
        ids=tuple(
            written(key_of(row.chosen.calibration, row.chosen.path))
            for memory in found.memories
            for row in memory.rows
            if row.largest_context
        ),
    )
