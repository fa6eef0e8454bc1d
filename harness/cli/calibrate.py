"""``harness calibrate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.context import command, positive_ints, store_at, store_option
from harness.cli.output import Output
from harness.errors import UsageError
from harness.text import clean


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("model", envvar="HARNESS_MODEL", required=False)
@click.option(
    "--engine",
    type=click.Choice(["auto", "ollama", "llama-server", "vllm"]),
    default="auto",
    envvar="HARNESS_ENGINE",
    show_default=True,
)
@click.option(
    "--sandbox",
    type=click.Choice(["auto", "docker", "process"]),
    default="auto",
    envvar="HARNESS_SANDBOX",
    show_default=True,
)
@click.option("--ctx", envvar="HARNESS_CTX", metavar="N,N,…", help="Contexts to load, tokens per slot.")
@click.option(
    "--num-batch",
    envvar="HARNESS_NUM_BATCH",
    default="auto",
    metavar="N|auto",
    help="Physical batch of every load; auto: as the engine would choose.",
)
@click.option("--kv-cache-type", envvar="HARNESS_KV_CACHE_TYPE", metavar="T", help="f16, q8_0, q4_0, …")
@click.option("--flash-attention", type=click.Choice(["auto", "on", "off"]), default="auto", envvar="HARNESS_FLASH_ATTENTION")
@click.option("--num-parallel", type=click.IntRange(1, 256), default=1, envvar="HARNESS_NUM_PARALLEL", help="Slots.")
@click.option("--gpus", default="all", envvar="HARNESS_GPUS", metavar="all|none|IDS", show_default=True)
@click.option("--image", envvar="HARNESS_IMAGE", metavar="REF", help="Image of the engine, by tag or digest.")
@click.option("--engine-binary", envvar="HARNESS_ENGINE_BINARY", metavar="PATH", help="Your own llama-server or vllm.")
@click.option("--models", envvar="HARNESS_MODELS", metavar="VOLUME|DIR", help="Where the engine's models lie already.")
@click.option("--env", "env", multiple=True, metavar="K=V", help="Environment of the engine; recorded, secrets redacted.")
@click.option("--variant", metavar="NAME", help="File this calibration beside the default one.")
@click.option("--no-speed", is_flag=True, help="Measure memory only.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    envvar="HARNESS_TIMEOUT",
    metavar="S",
    show_default=True,
    help="Longest wait for one answer of the engine.",
)
@click.option("--force", is_flag=True, help="Replace a calibration of another GPU, model or settings.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@store_option
@command
def cli(output: Output, **given: Any) -> None:
    """Measure MODEL in a clean engine and write its calibration.

    MODEL is a name of the catalog, the engine's own name, or the path of a GGUF file.
    """
    from harness.measure.prepare import RunOptions, prepare

    wishes = RunOptions(
        model=given["model"],
        engine=given["engine"],
        sandbox=given["sandbox"],
        contexts=positive_ints(given["ctx"], "--ctx"),
        num_batch=_batch(given["num_batch"]),
        kv_cache_type=given["kv_cache_type"],
        flash_attention=given["flash_attention"],
        num_parallel=given["num_parallel"],
        gpus=given["gpus"],
        image=given["image"],
        engine_binary=given["engine_binary"],
        models=given["models"],
        env=environment(given["env"]),
        variant=given["variant"],
        speed=not given["no_speed"],
        timeout=given["timeout"],
        force=given["force"],
    )
    store = store_at(given["store"])
    session = prepare(wishes, store, Path.cwd())
    from harness.cli.progress import watcher

    watch = watcher(quiet=output.as_json)
    with watch:
        for reason in session.choice.reasons:
            watch.say(reason)
        if given["dry_run"]:
            _dry_run(session, output)
        result = session.calibrate(watch)
    from harness.model.calibration import to_document

    if not output.as_json:
        _table(result)
    output.done(
        {
            "artifact": str(result.artifact),
            "record": str(result.record),
            "calibration": to_document(result.calibration),
        }
    )


def _dry_run(session: Any, output: Output) -> None:
    planned = session.plan()
    if not output.as_json:
        click.echo(f"would load {clean(session.request.name)}:")
        for load in planned.loads:
            batch = "the engine's batch" if load.num_batch is None else f"batch {load.num_batch}"
            click.echo(f"  {load.context:>7} tokens at {batch}")
        click.echo(f"and write {clean(str(planned.artifact))}")
    output.done({"artifact": str(planned.artifact), "loads": msgspec.to_builtins(planned.loads)})


def _table(result: Any) -> None:
    from harness.render.tables import calibration_panel, console

    shown = console()
    shown.print(calibration_panel(result.calibration, result.calibration.id))
    name = os.path.relpath(result.artifact)
    click.echo(f"written  {clean(name)}  ({result.seconds:.0f} s)")
    top = result.calibration.metadata.quality.valid_to
    click.echo(click.style("next     ", dim=True) + f"harness predict {clean(result.calibration.id)} --ctx {top}")


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    numbers = positive_ints(text, "--num-batch")
    if len(numbers) != 1:
        raise UsageError("--num-batch takes one number, or auto")
    return numbers[0]


def environment(pairs: tuple[str, ...]) -> dict[str, str]:
    """``--env K=V``, one or more."""
    env = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier() or "\0" in value:
            raise UsageError(f"--env takes NAME=VALUE, not {pair!r}")
        env[key] = value
    return env
