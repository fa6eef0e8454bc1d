"""``harness parse``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.context import command
from harness.cli.output import Output
from harness.errors import NotFoundError, NotPermittedError
from harness.logs import parse_chunks
from harness.text import clean
from harness.units import format_size

if TYPE_CHECKING:
    from harness.model.facts import LoadFacts

_CHUNK = 1 << 20


@click.command()
@click.argument("log")
@command
def cli(log: str, output: Output) -> None:
    """What an engine's LOG says of each load ("-" reads standard input)."""
    loads = read_log(log)
    if not output.as_json:
        for number, facts in enumerate(loads, 1):
            _show(number, facts)
        if not loads:
            click.echo("no load of a model is in this log")
    output.done({"loads": [facts.to_json() for facts in loads]})


def read_log(log: str) -> list[LoadFacts]:
    """The loads of a log file, "-" for standard input.

    Raises:
        NotFoundError, NotPermittedError: the file.
    """
    try:
        return parse_chunks(_chunks(log))
    except FileNotFoundError as error:
        raise NotFoundError(f"no such log: {log}", code="no-such-file") from error
    except OSError as error:
        raise NotPermittedError(f"{log} cannot be read: {error.strerror}") from error


def _chunks(log: str) -> Iterator[bytes]:
    with sys.stdin.buffer if log == "-" else Path(log).open("rb") as file:
        while block := file.read(_CHUNK):
            yield block


def _show(number: int, facts: LoadFacts) -> None:
    from rich.table import Table
    from rich.text import Text

    from harness.render.tables import console

    state = "failed" if facts.failed else "complete" if facts.complete else "incomplete"
    layers = "" if facts.layers_total is None else f" · {facts.layers_offloaded}/{facts.layers_total} layers on GPU"
    click.echo(
        clean(
            f"load {number} · {facts.engine} ({facts.dialect}) · {state}{layers}"
            + (" · estimated" if facts.estimated else "")
            + (f" · figures ± {format_size(facts.uncertainty_bytes)}" if facts.uncertainty_bytes else "")
        )
    )
    click.echo(
        clean(
            f"  {facts.model or 'model unknown'} · {facts.context_cells or '–'} cells · {facts.parallel or '–'} slots · "
            f"batch {facts.num_batch or '–'} · KV {facts.kv_cache_type or '–'} · flash attention {facts.flash_attention or '–'}"
        )
    )
    if facts.vllm is not None:
        vllm = facts.vllm
        times = "–" if vllm.max_concurrency is None else f"{vllm.max_concurrency:g}"
        length = f"{vllm.max_model_len:,}" if vllm.max_model_len else "–"
        tokens = f"{vllm.kv_tokens:,}" if vllm.kv_tokens is not None else "–"
        click.echo(clean(f"  vLLM {vllm.version or '–'} · {tokens} tokens of KV cache · {times} requests of {length} tokens"))
    if facts.failure:
        click.echo(clean(f"  {facts.failure}"))
    if facts.devices:
        table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
        parts = ("weights", "kv_cache", "recurrent", "compute", "output", "projector", "lora")
        for name in ("device", "kind", *parts):
            table.add_column(name.replace("_", " "), justify="left" if name in ("device", "kind") else "right")
        for name, device in facts.devices.items():
            table.add_row(Text(clean(name)), device.kind, *(format_size(getattr(device, f"{part}_bytes")) for part in parts))
        console().print(table)
