"""``harness serve``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from harness.cli.context import as_json, command, store_at
from harness.cli.options import allowed_of, filter_options, query_options, run_options, store_option, trust_options
from harness.cli.output import CommandResult, show
from harness.text import clean


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("model", metavar="MODEL[@CTX]", envvar="HARNESS_MODEL")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@query_options("ctx")
@run_options("num_parallel")
@click.option(
    "--on-offload",
    type=click.Choice(["warn", "refuse", "shrink", "tune"]),
    default="warn",
    show_default=True,
    help="Where it would be offloaded: start it anyway, refuse (3, or 4 if unknown), take the largest context that fits, or "
    "the settings of harness tune.",
)
@query_options("available", "measured_only")
@click.option("--port", metavar="N", type=click.IntRange(1, 65535), help="Port on 127.0.0.1; default: a free one.")
@run_options(
    "sandbox", "gpus", "image", "engine_binary", "models", "env", "timeout",
    image="Image of the engine; default: the calibrated one.", env="Environment of the engine.",
)  # fmt: skip
@trust_options
@filter_options
@store_option
@command
def cli(model: str, cmd: tuple[str, ...], store: str | None, **given: Any) -> CommandResult:
    """Check MODEL, start it clean, and run CMD in front of it; without CMD, until Ctrl-C.

    CMD's environment has HARNESS_ENDPOINT and OPENAI_BASE_URL (OLLAMA_HOST for Ollama). Its status is the command's own.
    """
    from harness.cli.progress import watcher
    from harness.options import QueryOptions, RunOptions
    from harness.serving import server as workflow
    from harness.serving.calibration_lookup import CalibrationFilter, read_question
    from harness.serving.child_process import find_command, run_command

    question = read_question(model, given["ctx"], given["num_parallel"])
    query, options = QueryOptions.of(given), RunOptions.of(given, model=question.model, allowed=allowed_of(given))
    argv = find_command(cmd) if cmd else ()
    watch = watcher(quiet=as_json())
    with watch:
        served = workflow.serve(
            question, options, store_at(store), on_offload=given["on_offload"], wanted=CalibrationFilter.of(query),
            available=query.available, measured_only=query.measured_only, port=given["port"], observer=watch,
        )  # fmt: skip
        with served as server:
            watch.rest()
            if argv:
                watch.say(f"endpoint {server.endpoint}")
                # With --json standard output holds one document, so the command's goes to standard error.
                status = run_command(
                    argv, server.environment(), server.check_alive, watch,
                    stdout=sys.stderr.fileno() if as_json() else None,
                )  # fmt: skip
                return CommandResult(data=_document(server), exit_code=status)
            if not as_json():
                show([f"endpoint {clean(server.endpoint)}"])
                watch.say("Ctrl-C ends it")
            while True:
                server.check_alive()
                time.sleep(0.2)


def _document(server: Any) -> dict[str, Any]:
    record: Path | None = server.record
    return {
        **server.assessment.to_json(),
        "endpoint": server.endpoint,
        "served_context": server.context,
        "observed_placement": server.observed_placement,
        "truth": server.observed_placement,  # its name before 0.2
        "disagreement": server.disagreement,
        "record": None if record is None else str(record),
    }
