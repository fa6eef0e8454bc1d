"""``harness import``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from harness.cli.context import command, store_at
from harness.cli.options import Text, run_options, store_option
from harness.cli.output import CommandResult
from harness.cli.parse import read_log
from harness.errors import UsageError
from harness.model.calibration import to_document
from harness.store.store import key_of
from harness.units import parse_size, read_numbers


@click.command()
@click.argument("logs", metavar="LOG...", nargs=-1, required=True)
@click.option(
    "--total",
    "totals",
    multiple=True,
    metavar="SIZE",
    help="Memory of a load on its device, one for each load; not needed for vLLM's log on a GPU.",
)
@click.option(
    "--load",
    "chosen",
    type=Text("load", read_numbers),
    default=(),
    metavar="N,…",
    help="Which loads of the log, by harness parse's numbers (all complete ones).",
)
@run_options("ctx", ctx={"envvar": None, "help": "Tokens per slot of each load, where the log does not say."})
@click.option("--model", metavar="NAME", help="The model's name, where the log names only a file.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="The GPU's name, as the driver prints it; one each.")
@click.option(
    "--gpu-memory",
    "card",
    metavar="SIZE",
    help="Memory of each GPU, as nvidia-smi prints it, where vLLM's log does not say it.",
)
@click.option("--variant", metavar="NAME", help="File it beside the default calibration.")
@click.option("--force", is_flag=True, help="Overwrite the calibration of another GPU, model or settings.")
@store_option
@command
def cli(
    logs: tuple[str, ...],
    totals: tuple[str, ...],
    chosen: tuple[int, ...],
    contexts: tuple[int, ...] | None,
    model: str | None,
    gpus: tuple[str, ...],
    card: str | None,
    variant: str | None,
    force: bool,
    store: str | None,
) -> CommandResult:
    """A calibration from an engine's LOG and the memory that others measured beside it ("-" reads standard input).

    Several logs of one model are read as one: their loads, in that order, become its points.
    """
    from harness.maintain.import_log import ImportOptions, import_log
    from harness.render import calibrations

    try:
        sizes = tuple(parse_size(one) for total in totals for one in total.split(","))
        memory = None if card is None else parse_size(card)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if card is not None and card.strip()[-1:] in "bB" and "ib" not in card.lower():
        raise UsageError(
            f"--gpu-memory {card} is decimal, and the memory of a GPU is not: 24 GB on a box are 24 GiB or a little less",
            hint="give it as nvidia-smi prints it, for example 24564MiB",
            code="decimal-size",
        )
    options = ImportOptions(
        log=", ".join(Path(log).name for log in logs),
        totals=sizes,
        chosen=chosen,
        contexts=contexts or (),
        model=model,
        gpus=gpus,
        variant=variant,
        force=force,
        card=memory,
    )
    done = import_log([one for log in logs for one in read_log(log).loads], options, store_at(store))
    return CommandResult(
        data={"artifact": str(done.artifact), "record": str(done.record), "calibration": to_document(done.calibration)},
        text=partial(calibrations.imported, done.calibration, key_of(done.calibration, done.artifact), str(done.artifact)),
    )
