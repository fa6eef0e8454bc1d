"""``harness export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.context import command
from harness.cli.options import allowed_of, filter_options, options_of, query_options, store_option, trust_options
from harness.cli.output import CommandResult
from harness.exports.formats import FORMATS
from harness.options import QueryOptions, TuneOptions
from harness.render.tables import Verbatim


@click.command()
@click.argument("name", metavar="FORMAT", type=click.Choice(list(FORMATS)))
@click.argument("names", metavar="[MODEL[@CTX]]...", nargs=-1)
@click.option(
    "--as", "style", metavar="STYLE",
    help="; ".join(f"{name}: {' | '.join(one.styles)}" for name, one in FORMATS.items() if one.styles) + ".",
)  # fmt: skip
@options_of(TuneOptions, "slots")
@query_options("available", "gpu", "host_available", gpu="For this GPU: an index, a UUID, or the engine's name of it.")
@click.option("--models-folder", default="/models", show_default=True, metavar="DIR", help="Where files of weights are.")
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write to a file.")
@trust_options
@filter_options
@store_option
@command
def cli(
    name: str, names: tuple[str, ...], style: str | None, models_folder: str, output: Path | None, **given: Any
) -> CommandResult:
    """Settings that fit, in the formats of the programs that run models.

    MODEL@CTX is written with this context, or ends with 3; MODEL with the largest that fits. Without models: every calibrated
    one that fits and that the format can hold. Each file says from which calibration it is, when that was made, and its bound.
    """
    from harness.api import exported

    slots = TuneOptions.of(given).slots
    found = exported(
        name, names, QueryOptions.of(given), style=style, slots=slots, folder=models_folder, allowed=allowed_of(given)
    )
    if output is not None:
        output.write_text(found.text, encoding="utf-8")
    return CommandResult(
        data={
            "format": name,
            "style": style,
            "text": found.text,
            "output": None if output is None else str(output),
            "models": [{"model": one.model, "calibration": one.key, "context": one.verdict.context} for one in found.entries],
        },
        text=lambda: [Verbatim(found.text.rstrip("\n"))] if output is None else [f"wrote {output}"],
        warnings=found.warnings,
    )
