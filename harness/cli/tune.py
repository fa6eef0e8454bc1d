"""``harness tune``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from harness.cli.context import command, context_of
from harness.cli.options import filter_options, options_of, query_options, store_option
from harness.cli.output import CommandResult
from harness.options import QueryOptions, TuneOptions


@click.command()
@click.argument("model", metavar="MODEL[@CTX]", envvar="HARNESS_MODEL")
@options_of(TuneOptions, "min_ctx", "min_tokens_per_s", "slots")
@query_options("available", "gpu", "host_available", gpu="Tune for this GPU: an index, a UUID, or the engine's name of it.")
@filter_options
@store_option
@command
def cli(model: str, **given: Any) -> CommandResult:
    """The best settings of MODEL for a budget. Ends with 0, 3 (out of reach) or 4 (unknown).

    If it does not fit: what would make it fit, the cheapest first. Nothing but what was measured or follows exactly from it.
    """
    from harness.api import tuned
    from harness.render.tuning import tuning_text

    model, given["min_ctx"] = context_of(model, given["min_ctx"])
    found = tuned(model, TuneOptions.of(given), QueryOptions.of(given))
    return CommandResult(
        data=found.to_json(),
        text=partial(tuning_text, found),
        warnings=(*found.chosen.warnings, *((found.beyond,) if found.beyond else ())),
        exit_code=found.exit_code,
    )
