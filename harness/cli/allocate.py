"""``harness allocate``."""

from __future__ import annotations

import click
import msgspec

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import Output
from harness.text import clean
from harness.units import format_size


@click.command()
@click.argument("model", envvar="HARNESS_MODEL")
@query_options("ctx", ctx={"required": True, "help": "Tokens of each sequence."})
@click.option("--concurrency", type=click.IntRange(1, 4096), default=1, show_default=True, help="Sequences at full length.")
@query_options("available", available="Free memory, one size for each GPU; else read now.")
@click.option("--engine-version", metavar="V", help="The release that will run, where it is not the one that was measured.")
@click.option("--gpu-name", metavar="NAME", help="The GPU that will run it, as the driver calls it.")
@click.option("--tensor-parallel", type=click.IntRange(min=1), metavar="N")
@click.option("--dtype", metavar="T")
@query_options("variant")
@click.option("--compose", is_flag=True, help="Print a service for Docker Compose instead of a command line.")
@store_option
@command
def cli(
    model: str,
    ctx: int,
    concurrency: int,
    available: tuple[int, ...] | None,
    engine_version: str | None,
    gpu_name: str | None,
    tensor_parallel: int | None,
    dtype: str | None,
    variant: str | None,
    compose: bool,
    store: str | None,
    output: Output,
) -> None:
    """The options with which vLLM starts MODEL with a context, or why it cannot."""
    from harness.prediction.allocation import Deployment
    from harness.serving import allocate as workflow

    wanted = Deployment(version=engine_version, gpu=gpu_name, tensor_parallel=tensor_parallel, dtype=dtype)
    answer = workflow.answer(store_at(store), model, ctx, concurrency, wanted, variant=variant, available=available)
    allocation = answer.allocation
    metadata = answer.calibration.metadata
    service = workflow.compose(answer) if compose or (output.as_json and metadata.engine.image) else None
    if not output.as_json:
        click.echo(clean(service if service is not None else workflow.shell(answer)), nl=service is None)
        on = metadata.machine.gpus[0].name if metadata.machine.gpus else "host memory"
        click.echo(
            clean(
                f"# {allocation.blocks} blocks of {allocation.block_size} tokens and {allocation.spare_blocks} to spare: "
                f"{format_size(allocation.kv_cache_bytes)} beside {format_size(allocation.footprint_bytes)}, "
                f"{format_size(allocation.available_bytes)} are free · largest context {allocation.max_context:,}\n"
                f"# measured with vLLM {metadata.engine.version or '(version unknown)'} on {on}"
            ),
            err=service is None,
        )
    output.done({**msgspec.to_builtins(allocation), "shell": workflow.shell(answer), "compose": service})
