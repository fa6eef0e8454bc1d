"""``harness bisect``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.context import as_json, command, context_of, store_at
from harness.cli.options import Text, run_options, store_option
from harness.cli.output import CommandResult
from harness.errors import NotFoundError
from harness.options import RunOptions
from harness.units import parse_token_list


@click.command()
@click.argument("model", metavar="MODEL[@CTX]", envvar="HARNESS_MODEL")
@click.option("--good", required=True, metavar="TAG", help="The last version whose memory is as expected.")
@click.option("--bad", required=True, metavar="TAG", help="A version whose memory differs.")
@click.option("--versions", metavar="TAG,TAG,…", help="Versions to choose from; default: all of the registry or index.")
@click.option("--wheels", is_flag=True, help="Releases of the embedded engine instead of images.")
@click.option(
    "--ctx", metavar="N,N,…", type=Text("ctx", parse_token_list), help="Contexts of each step; default: 2048,4096,8192."
)
@run_options(
    "engine", "gpus", "models", "kv_cache_type", "flash_attention", "num_batch", "num_parallel", "env", "timeout", "image",
    image="The image without its tag; default: the pinned one.",
)  # fmt: skip
@store_option
@command
def cli(
    model: str,
    good: str,
    bad: str,
    versions: str | None,
    wheels: bool,
    ctx: tuple[int, ...] | None,
    store: str | None,
    **given: Any,
) -> CommandResult:
    """Which version of an engine changed the memory of MODEL: a binary search between two tags of its image.

    Each step is a small calibration that is not kept. Versions that cannot be measured are skipped.
    """
    from harness.cli.progress import watcher
    from harness.maintain.bisect import CONTEXTS, bisect, measuring, ordered
    from harness.maintain.versions import source
    from harness.render.bisect import bisection_text, document

    model, context = context_of(model, None)
    contexts = (context,) if context else ctx or CONTEXTS
    if "/" in model and (known := store_at(store).find(model)):
        model, given["engine"] = known[0][1].metadata.model.name, known[0][1].engine
    options = RunOptions.of(given, model=model, contexts=contexts)
    options = msgspec.structs.replace(options, speed=False, sandbox="process" if wheels else "docker", image=None)
    if model.endswith(".gguf") and not Path(model).expanduser().is_file():
        raise NotFoundError(f"there is no file {model}")
    found = source(options.engine, given["image"], Path.cwd(), wheels=wheels)
    inside = ordered(versions.split(",") if versions else found.versions(), good, bad)
    options = msgspec.structs.replace(options, engine=found.engine)
    watch = watcher(quiet=as_json())
    with watch:
        steps = 2 + (len(inside) - 2).bit_length()
        watch.say(f"{len(inside)} versions, about {steps} calibrations: {inside[0]} … {inside[-1]}")
        with measuring(options, watch, found.option) as measure:
            result = bisect(inside, measure, watch)
    return CommandResult(data=document(result), text=partial(bisection_text, result))
