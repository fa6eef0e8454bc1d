"""``harness exporter``."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import CommandResult
from harness.errors import UsageError

#: Addresses that only this machine reaches.
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command()
@click.option("--listen", default="127.0.0.1:9477", show_default=True, metavar="HOST:PORT", help="Address to serve on.")
@click.option("--textfile", type=click.Path(path_type=Path), metavar="FILE", help="Write a file for node_exporter instead.")
@click.option(
    "--interval",
    type=click.FloatRange(1),
    default=10,
    show_default=True,
    metavar="S",
    help="Seconds between two writes of --textfile.",
)
@click.option("--once", is_flag=True, help="Write --textfile once, or print it, and end.")
@store_option
@command
def cli(listen: str, textfile: Path | None, interval: float, once: bool, store: str | None) -> CommandResult:
    """Metrics of the models that run here: memory measured and predicted, headroom, layers on the host.

    Served on this machine only, as OpenMetrics; --textfile needs no extra package.
    """
    from harness.exports.prometheus import exposition
    from harness.serving.live_metrics import METRICS, Exporter
    from harness.serving.live_metrics import listen as answer
    from harness.store.store import write_atomically

    exporter = Exporter(store_at(store))
    if textfile is not None or once:
        while True:
            text = exposition(exporter.samples(), METRICS)
            if textfile is not None:
                write_atomically(textfile, text.encode())
            if once:
                said = text if textfile is None else f"wrote {textfile}"
                where = None if textfile is None else str(textfile)
                return CommandResult(data={"metrics": text, "textfile": where}, text=partial(iter, [said]))
            time.sleep(interval)
    host, _, port = listen.rpartition(":")
    if host.strip("[]") not in _LOOPBACK or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(
            f"{listen} is not a port on this machine's loopback address: 127.0.0.1:9477, or [::1]:9477",
            hint="a scraper elsewhere reads node_exporter's textfile (--textfile), or a proxy with a login in front",
        )
    stop = answer(exporter, host.strip("[]"), int(port))
    click.echo(f"http://{host}:{port}/metrics; Ctrl-C ends it", err=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        stop()
