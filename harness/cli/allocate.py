"""``harness allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.context import as_json, command, store_at
from harness.cli.options import allowed_of, query_options, settings_options, store_option, trust_options
from harness.cli.output import CommandResult
from harness.options import MAX_SLOTS, QueryOptions
from harness.render.calibrations import allocation_remarks
from harness.render.tables import Verbatim
from harness.text import clean


@click.command()
@click.argument("model", metavar="MODEL[@CTX]", envvar="HARNESS_MODEL")
@query_options("ctx", ctx="Tokens of each sequence, where MODEL names none.")
@click.option(
    "--concurrency", metavar="N", type=click.IntRange(1, MAX_SLOTS), default=1, show_default=True,
    envvar="HARNESS_NUM_PARALLEL", help="Sequences at full length.",
)  # fmt: skip
@query_options("available", available="Free memory, one size for each GPU; default: read now.")
@click.option("--engine-version", metavar="V", help="The release that will run, if not the one that was measured.")
@click.option("--gpu-name", metavar="NAME", help="The GPU that will run it, as the driver calls it.")
@click.option("--tensor-parallel", type=click.IntRange(min=1), metavar="N", help="GPUs that share the model.")
@click.option("--dtype", metavar="T", help="Type of the weights and of computation (bfloat16, float16).")
@settings_options
@click.option("--compose", is_flag=True, help="Print a service for Docker Compose instead of a command line.")
@trust_options
@store_option
@command
def cli(
    model: str,
    ctx: int | None,
    concurrency: int,
    engine_version: str | None,
    gpu_name: str | None,
    tensor_parallel: int | None,
    dtype: str | None,
    compose: bool,
    store: str | None,
    **given: Any,
) -> CommandResult:
    """The options with which vLLM starts MODEL with a context, or why it cannot."""
    from harness.prediction.allocation import Deployment
    from harness.serving import allocate as workflow
    from harness.serving.calibration_lookup import CalibrationFilter, read_question
    from harness.store.trust import is_own_folder, refuse

    wanted = Deployment(version=engine_version, gpu=gpu_name, tensor_parallel=tensor_parallel, dtype=dtype)
    asked, query = read_question(model, ctx), QueryOptions.of(given)
    answer = workflow.answer(
        store_at(store), asked.model, asked.context, concurrency, wanted, settings=CalibrationFilter.of(query),
        available=query.available,
    )  # fmt: skip
    measured = answer.calibration
    # Nothing is started here: a folder of the model's own name is printed as it was measured.
    printed = ("weights",) if is_own_folder(measured) else ()
    refuse(measured, Path.cwd(), allowed_of(given), measured.id, typed=printed)
    allocation, image = answer.allocation, answer.calibration.metadata.engine.image
    service = workflow.compose(answer) if compose or (as_json() and image) else None
    command_line, remarks = workflow.shell(answer), allocation_remarks(allocation, answer.calibration)
    return CommandResult(
        data={**msgspec.to_builtins(allocation), "shell": command_line, "compose": service},
        text=lambda: [Verbatim(clean(command_line))] if service is None else [Verbatim(clean(service)), Verbatim(remarks)],
        notes=() if as_json() or service is not None else (remarks,),
    )
