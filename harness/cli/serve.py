"""``harness serve``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from harness.cli.calibrate import environment
from harness.cli.context import allowed_of, command, guard_options, store_option, trust_options, wanted_of
from harness.cli.output import Output
from harness.text import clean


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("model", envvar="HARNESS_MODEL")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@click.option("--ctx", type=click.IntRange(min=1, max=1 << 31), help="Tokens per slot.")
@click.option("--num-parallel", type=click.IntRange(1, 256), default=1, show_default=True, help="Slots.")
@click.option(
    "--on-offload",
    type=click.Choice(["warn", "refuse", "shrink"]),
    default="warn",
    show_default=True,
    help="Where it would spill: start it all the same, refuse (3, or 4 if unknown), or take the largest context that fits.",
)
@click.option("--available", envvar="HARNESS_AVAILABLE", metavar="SIZE[,SIZE]", help="What is free, instead of reading it.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port on 127.0.0.1; else a free one.")
@click.option("--sandbox", type=click.Choice(["auto", "docker", "process"]), default="auto", envvar="HARNESS_SANDBOX")
@click.option("--gpus", default="all", envvar="HARNESS_GPUS", metavar="all|none|IDS", show_default=True)
@click.option("--image", envvar="HARNESS_IMAGE", metavar="REF", help="Image of the engine; else the one calibrated.")
@click.option("--engine-binary", envvar="HARNESS_ENGINE_BINARY", metavar="PATH", help="Your own llama-server or vllm.")
@click.option("--models", envvar="HARNESS_MODELS", metavar="VOLUME|DIR", help="Where the engine's models lie already.")
@click.option("--env", "env", multiple=True, metavar="K=V", help="Environment of the engine.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600.0, envvar="HARNESS_TIMEOUT", metavar="S", show_default=True
)
@trust_options
@guard_options
@store_option
@command
def cli(model: str, cmd: tuple[str, ...], store: str | None, output: Output, **given: Any) -> None:
    """Check MODEL, start it clean, and run CMD in front of it; without CMD, until Ctrl-C.

    CMD's environment has HARNESS_ENDPOINT and OPENAI_BASE_URL (OLLAMA_HOST for Ollama). Its status is the command's own.
    """
    from harness.api import serve
    from harness.cli.progress import watcher
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.child_process import find_command, run_command

    argv = find_command(cmd) if cmd else ()
    watch = watcher(quiet=output.as_json)
    with watch:
        served = serve(
            model, given["ctx"], num_parallel=given["num_parallel"], on_offload=given["on_offload"],
            available=given["available"] or None, port=given["port"], wanted=CalibrationFilter(**wanted_of(given)), store=store,
            observer=watch, engine=given["engine"] or "auto", sandbox=given["sandbox"], gpus=given["gpus"],
            kv_cache_type=given["kv_cache_type"], flash_attention=given["flash_attention"], image=given["image"],
            engine_binary=given["engine_binary"], models=given["models"], env=environment(given["env"]),
            timeout=given["timeout"], allowed=allowed_of(given),
        )  # fmt: skip
        with served as server:
            watch.rest()
            if argv:
                watch.say(f"endpoint {server.endpoint}")
                # With --json standard output holds one document, so the command's goes to standard error.
                status = run_command(
                    argv, server.environment(), server.check_alive, watch,
                    stdout=sys.stderr.fileno() if output.as_json else None,
                )  # fmt: skip
                output.done(_document(server), status)
            if not output.as_json:
                click.echo(f"endpoint {clean(server.endpoint)}")
                watch.say("Ctrl-C ends it")
            while True:
                server.check_alive()
                time.sleep(0.2)


def _document(server: Any) -> dict[str, Any]:
    record: Path | None = server.record
    return {
        **server.judged.to_json(),
        "endpoint": server.endpoint,
        "served_context": server.context,
        "truth": server.truth,
        "disagreement": server.disagreement,
        "record": None if record is None else str(record),
    }
