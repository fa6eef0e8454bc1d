"""``harness estimate``."""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import msgspec

from harness.cli.context import command, context_of, store_at
from harness.cli.options import Text, query_options, store_option
from harness.cli.output import CommandResult
from harness.options import QueryOptions
from harness.units import parse_token_list


@click.command()
@click.argument("names", metavar="MODEL[@CTX]...", nargs=-1, required=True)
@click.option(
    "--ctx",
    metavar="N,N,…",
    type=Text("ctx", parse_token_list),
    default="8192,32768",
    show_default=True,
    help="Contexts, tokens per slot.",
)
@click.option(
    "--kv-cache-type", metavar="T,T,…", default="f16", show_default=True, envvar="HARNESS_KV_CACHE_TYPE",
    help="Types of the KV cache: f16, q8_0, …",
)  # fmt: skip
@query_options(
    "num_parallel", "available", "gpu", "flash_attention", "num_batch", "engine",
    available="A card with this much free memory, instead of this machine.",
    gpu="For this GPU: an index, a UUID, or the engine's name of it.",
    flash_attention="Flash attention; auto: the engine's own choice.",
    num_batch="Physical batch; auto: as the engine would choose.",
    engine="Whose rules for batch and placement.",
)  # fmt: skip
@store_option
@command
def cli(names: tuple[str, ...], ctx: tuple[int, ...], kv_cache_type: str, store: str | None, **given: Any) -> CommandResult:
    """Memory of models that were not measured, from their headers: a few megabytes of each are read.

    MODEL is a .gguf file, an https address, hf.co/OWNER/REPO (every quantisation) or hf.co/OWNER/REPO:QUANTISATION, a name
    of the catalog, or of Ollama's registry. A context behind a name stands in place of --ctx.
    """
    from harness.inventory.machine import LocalMachine
    from harness.render.estimates import estimates_text
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.estimate_table import estimates

    query = QueryOptions.of(given)
    pairs = [context_of(name, None) for name in names]
    contexts = tuple(sorted({context for _, context in pairs if context})) or ctx
    types = tuple(QueryOptions(kv_cache_type=kind.strip()).kv_cache_type or "" for kind in kv_cache_type.split(","))
    found = estimates(
        [name for name, _ in pairs], store_at(store), LocalMachine(query.gpu), wanted=CalibrationFilter.of(query),
        contexts=contexts, kv_cache_types=types, num_parallel=query.num_parallel, available=query.available,
    )  # fmt: skip
    return CommandResult(data=msgspec.to_builtins(found), text=partial(estimates_text, found))
