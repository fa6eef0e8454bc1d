"""``harness check``."""

from __future__ import annotations

from typing import Final

import click

from harness.cli.context import command, guard_options, store_option, wanted_of
from harness.cli.output import Output

#: Exit status of each verdict.
STATUS: Final = {"fits": 0, "offload": 3, "unknown": 4}


@click.command()
@click.argument("models", metavar="MODEL[@CTX]...", nargs=-1, required=True)
@click.option("--ctx", type=click.IntRange(min=1, max=1 << 31), help="Tokens per slot, where MODEL names none.")
@click.option("--num-parallel", type=click.IntRange(1, 4096), default=1, show_default=True, help="Slots.")
@click.option("--available", envvar="HARNESS_AVAILABLE", metavar="SIZE[,SIZE]", help="What is free, instead of reading it.")
@click.option("--gpu", metavar="ID", help="Judge for this GPU: an index, a UUID, or the engine's name of it.")
@click.option("--extrapolate", is_flag=True, help="Answer beyond the calibrated range too, with a warning.")
@guard_options
@store_option
@command
def cli(
    models: tuple[str, ...], ctx: int | None, num_parallel: int, available: str | None, gpu: str | None,
    extrapolate: bool, store: str | None, output: Output, **which: str | None,
) -> None:  # fmt: skip
    """Will it fit, or spill to the CPU? Ends with 0 (fits), 3 (offload likely) or 4 (unknown).

    MODEL@8192 names a context, MODEL@sha256:… the exact weights. Several models are judged together, in their order.
    """
    from harness.api import check

    found = check(
        *models, ctx=ctx, num_parallel=num_parallel, available=available or None, gpu=gpu, extrapolate=extrapolate,
        store=store, **wanted_of(which),
    )  # fmt: skip
    for text in dict.fromkeys(text for one in found.models for text in one.warnings):
        output.warn(text)
    if not output.as_json:
        from harness.render.check import describe

        click.echo("\n".join(describe(found)))
    output.done(found.to_json(), STATUS[found.verdict])
