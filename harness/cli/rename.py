"""``harness rename``."""

from __future__ import annotations

import shlex

import click
import msgspec

from harness.cli.context import command, store_at, without_context
from harness.cli.options import store_option
from harness.cli.output import CommandResult
from harness.errors import CannotWriteError, NotFoundError, UsageError
from harness.model.calibration import artifact_name
from harness.options import check_variant
from harness.text import clean, written


@click.command()
@click.argument("old", metavar="MODEL[@VARIANT]")
@click.argument("new", metavar="NAME[@VARIANT]")
@store_option
@command
def cli(old: str, new: str, store: str | None) -> CommandResult:
    """File a calibration under another name, or as another variant. What was measured stays as it is."""
    from harness.inventory.weights import calibrations_of
    from harness.store.store import key_of, variant_of

    shelf = store_at(store)
    without_context(old)
    found = calibrations_of(shelf, old)
    wanted = [one for one in found if shelf.names_variant(old, found) or variant_of(one[0]) is None]
    if not wanted:
        raise NotFoundError(shelf.missing(old), hint="harness list -q", code="no-calibration")
    ((path, calibration),) = wanted
    name, at, variant = new.removeprefix(f"{calibration.engine}/").partition("@")
    if not name or (at and not variant):
        raise UsageError(f"{new!r} is not a name for a calibration", hint="NAME, or NAME@VARIANT")
    try:
        check_variant(variant)
    except ValueError as error:
        raise UsageError(str(error)) from error
    target = shelf.path_of(calibration.engine, name, variant or None)
    if target.exists():
        there = written(f"{calibration.engine}/{target.stem}")
        raise CannotWriteError(
            f"{target} exists already", hint=f"remove it first: harness rm {shlex.quote(there)}", code="would-overwrite"
        )
    moved = msgspec.structs.replace(calibration, id=f"{calibration.engine}/{artifact_name(name)}")
    with shelf.lock(path):
        shelf.write(target, moved)
        path.unlink()
    before, after = key_of(calibration, path), key_of(moved, target)
    return CommandResult(
        data={"old": before, "new": after, "path": str(target)}, ids=(written(after),),
        text=lambda: [f"{clean(written(before))} is now {clean(written(after))}"],
    )  # fmt: skip
