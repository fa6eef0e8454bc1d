"""``harness share``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import query_options, store_option
from harness.cli.output import CommandResult
from harness.cli.select import select
from harness.errors import NotFoundError, UsageError
from harness.options import QueryOptions

#: Where shared calibrations are, in the project's repository.
COMMUNITY = Path("models/community")


@click.command()
@click.argument("names", metavar="MODEL[@VARIANT]", nargs=-1, required=True)
@query_options("engine", "variant", variant="This variant of the calibration.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write below.", default=COMMUNITY
)
@click.option(
    "--check", is_flag=True, help="Check shared files and folders instead: their figures have to follow from their records."
)
@store_option
@command
def cli(names: tuple[str, ...], output: Path, check: bool, store: str | None, **given: Any) -> CommandResult:
    """One calibration with its record, anonymised, as a file for a pull request.

    No host name, path, variable, UUID or time of day is included; the figures have to follow from what is left of the record.
    """
    if check:
        return _checked(names)
    from harness.maintain.share import share
    from harness.store.store import write_atomically

    if len(names) > 1:
        raise UsageError("only one model can be shared at a time", hint="--check takes several files")
    shelf = store_at(store)
    shared = share(shelf, select(shelf, names[0], QueryOptions.of(given))[1])
    path = output / shared.name
    write_atomically(path, shared.encoded())
    return CommandResult(
        data={"files": [str(path)]}, text=lambda: [f"wrote {path}: read it, then propose it"],
    )  # fmt: skip


def _checked(names: tuple[str, ...]) -> CommandResult:
    from harness.maintain.share import check

    paths = []
    for name in map(Path, names):
        if not name.exists():
            raise NotFoundError(f"no such file: {name}", code="no-such-file")
        paths += [name] if name.is_file() else sorted(name.rglob("*.json"))
    for path in paths:
        check(path)
    files = [str(path) for path in paths]
    return CommandResult(data={"files": files}, text=lambda: [f"{len(files)} shared calibrations follow from their records"])
