"""``harness mcp``."""

from __future__ import annotations

from typing import NoReturn

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option


@click.command()
@click.option("--network", is_flag=True, help="Estimates may read headers of models from their registries.")
@store_option
@command
def cli(*, network: bool, store: str | None) -> NoReturn:
    """A server for agents on standard input and output (Model Context Protocol): check, plan, tune, estimate.

    Answers are labelled measured, derived, estimated or unknown. Nothing is started, measured or written.
    """
    from harness.serving.agents import AgentTools, make_server

    make_server(AgentTools(store_at(store), network=network)).run("stdio")
    raise SystemExit(0)
