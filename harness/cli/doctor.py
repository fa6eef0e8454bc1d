"""``harness doctor``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import click
import msgspec

from harness.cli.context import command, store_at, store_option
from harness.cli.output import Output, clean

_MARKS: Final = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("not there", "red")}


@click.command()
@store_option
@command
def cli(store: str | None, output: Output) -> None:
    """What works here, what does not, and why; and where each setting comes from."""
    from harness.config import settings
    from harness.workflows.doctor import examine

    findings = examine(store_at(store).root)
    found = settings(dict(os.environ), Path.cwd())
    if not output.as_json:
        for finding in findings:
            word, colour = _MARKS[finding.state]
            click.echo(f"{click.style(f'{word:>9}', fg=colour)}  {finding.subject}: {clean(finding.text)}")
            if finding.hint:
                click.echo(f"{'':>9}  {click.style(clean(finding.hint), dim=True)}")
        for key, (value, origin) in sorted(found.items()):
            click.echo(f"  setting  {key} = {clean(str(value))}  ({clean(origin)})")
    output.done(
        {
            "findings": msgspec.to_builtins(findings),
            "settings": {key: {"value": value, "from": origin} for key, (value, origin) in found.items()},
        }
    )
