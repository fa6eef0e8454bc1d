"""``harness rm``."""

from __future__ import annotations

import click

from harness.cli.context import command, store_at, without_context
from harness.cli.options import store_option
from harness.cli.output import CommandResult
from harness.errors import NotFoundError
from harness.text import clean, written


@click.command("rm")
@click.argument("calibrations", metavar="MODEL[@VARIANT]...", nargs=-1, required=True)
@store_option
@command
def cli(calibrations: tuple[str, ...], store: str | None) -> CommandResult:
    """Remove calibrations: of a name the default file alone, of NAME@VARIANT that variant.

    Records of their runs stay, and `harness fit RUN -o FILE` builds the artifact again.
    """
    from harness.inventory.weights import calibrations_of
    from harness.store.store import key_of, variant_of

    shelf, wanted = store_at(store), []
    for name in calibrations:
        without_context(name)
        found = calibrations_of(shelf, name)
        plain = [one for one in found if shelf.names_variant(name, found) or variant_of(one[0]) is None]
        if not plain:
            known = ", ".join(written(key_of(one, path)) for path, one in found)
            raise NotFoundError(
                shelf.missing(name) if not found else f"{name} has only variants: {known}",
                hint="harness list -q",
                code="only-variants" if found else "no-calibration",
            )
        wanted += plain
    for path, _ in wanted:
        path.unlink(missing_ok=True)
    runs = [one.metadata.run for _, one in wanted]
    lines = [
        f"removed  {clean(written(key_of(one, path)))}" + (f"  (record {clean(run)} stays)" if run else "")
        for (path, one), run in zip(wanted, runs, strict=True)
    ]
    keys = [key_of(one, path) for path, one in wanted]
    return CommandResult(
        data={"removed": [{"calibration": key, "run": run} for key, run in zip(keys, runs, strict=True)]},
        ids=tuple(map(written, keys)), text=lambda: lines,
    )  # fmt: skip
