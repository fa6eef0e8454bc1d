"""``harness check``."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import click

from harness.cli.context import command
from harness.cli.options import PLACING, filter_options, query_options, store_option
from harness.cli.output import CommandResult
from harness.options import QueryOptions

#: Exit status of each verdict.
STATUS: Final = {"fits": 0, "offload": 3, "unknown": 4}


@click.command()
@click.argument("names", metavar="MODEL[@CTX]...", nargs=-1, required=True)
@query_options(
    "ctx",
    "num_parallel",
    "available",
    "gpu",
    "extrapolate",
    *PLACING,
    "measured_only",
    gpu="Check for this GPU: an index, a UUID, or the engine's name of it.",
)
@filter_options
@store_option
@click.option("--explain", is_flag=True, help="Explain the engine's decision, step by step.")
@command
def cli(names: tuple[str, ...], *, explain: bool, **given: Any) -> CommandResult:
    """Will it fit, or be offloaded to the CPU? Ends with 0 (fits), 3 (offload likely) or 4 (unknown).

    MODEL@8192 names a context, MODEL@sha256:… the exact weights. Several models are checked together, in their order.
    """
    from harness.api import judge
    from harness.render.check import describe

    found = judge(names, QueryOptions.of(given))
    return CommandResult(
        data=found.to_json(),
        text=partial(describe, found, explain=explain),
        warnings=dict.fromkeys(text for one in found.models for text in one.warnings),
        exit_code=STATUS[found.verdict],
    )
