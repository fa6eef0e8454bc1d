"""``harness plan``."""

from __future__ import annotations

from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import filter_options, query_options, store_option
from harness.cli.output import Output
from harness.options import QueryOptions
from harness.text import clean


@click.command()
@click.argument("names", metavar="[MODEL[@CTX]]...", nargs=-1)
@query_options(
    "ctx", "num_parallel", "available", "gpu",
    ctx={"default": 8192, "show_default": True, "help": "Context of models put together."},
    available="A card with so much free, not this machine's.",
    gpu="Plan for this GPU: an index, a UUID, or the engine's name of it.",
)  # fmt: skip
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@filter_options
@store_option
@command
def cli(names: tuple[str, ...], markdown: bool, store: str | None, output: Output, **given: Any) -> None:
    """The largest context of every calibrated model that fits here, its speed, and who fits with whom."""
    from harness.inventory.machine import MachineNow
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.capacity import plan

    shelf, query = store_at(store), QueryOptions.of(given)
    found = plan(
        names, shelf, MachineNow(query.gpu), wanted=CalibrationFilter.of(query), num_parallel=query.num_parallel,
        context=given["ctx"], available=query.available,
    )  # fmt: skip
    for text in found.warnings:
        output.warn(text)
    if not output.as_json:
        if not found.memories:
            click.echo(f"no calibrations in {clean(str(shelf.root))}; make one with: harness calibrate")
        elif markdown:
            from harness.render.capacity import memory_markdown

            click.echo("\n\n".join(memory_markdown(one) for one in found.memories))
        else:
            from harness.render.capacity import memory_table
            from harness.render.tables import console

            for number, one in enumerate(found.memories):
                console().print(*([""] if number else []), memory_table(one), sep="\n")
    output.done({"memories": [one.to_json() for one in found.memories]})
