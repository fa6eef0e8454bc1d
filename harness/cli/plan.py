"""``harness plan``."""

from __future__ import annotations

import click

from harness.cli.context import command, guard_options, store_at, store_option, wanted_of
from harness.cli.output import Output
from harness.text import clean


@click.command()
@click.argument("models", metavar="[MODEL[@CTX]]...", nargs=-1)
@click.option(
    "--ctx", type=click.IntRange(min=1, max=1 << 31), default=8192, show_default=True, help="Context of models put together."
)
@click.option("--num-parallel", type=click.IntRange(1, 4096), default=1, show_default=True, help="Slots.")
@click.option(
    "--available", envvar="HARNESS_AVAILABLE", metavar="SIZE[,SIZE]", help="A card with so much free, not this machine's."
)
@click.option("--gpu", metavar="ID", help="Plan for this GPU: an index, a UUID, or the engine's name of it.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@guard_options
@store_option
@command
def cli(
    models: tuple[str, ...], ctx: int, num_parallel: int, available: str | None, gpu: str | None, markdown: bool,
    store: str | None, output: Output, **which: str | None,
) -> None:  # fmt: skip
    """The largest context of every calibrated model that fits here, its speed, and who fits with whom."""
    from harness.inventory.machine import MachineNow, parse_available
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.capacity import plan

    shelf = store_at(store)
    found = plan(
        models, shelf, MachineNow(gpu), wanted=CalibrationFilter(**wanted_of(which)), num_parallel=num_parallel, context=ctx,
        available=parse_available(available) if available else None,
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
