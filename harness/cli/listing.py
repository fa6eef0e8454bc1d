"""``harness list``."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.context import command, store_at
from harness.cli.options import store_option
from harness.cli.output import Output
from harness.errors import HarnessError
from harness.model.calibration import to_document
from harness.text import clean


@click.command("list")
@click.option("--catalog", is_flag=True, help="List the names that the catalog knows instead.")
@store_option
@command
def cli(catalog: bool, store: str | None, output: Output) -> None:
    """All calibrations of the store."""
    if catalog:
        _catalog(output)
    shelf = store_at(store)
    entries, found = [], []
    for path in shelf.paths():
        try:
            calibration = shelf.read(path)
        except HarnessError as error:
            output.warn(error.message)
            continue
        variant = path.stem.partition("@")[2] or None
        entries.append({**to_document(calibration), "path": str(path), "variant": variant})
        found.append((calibration, variant))
    if not output.as_json:
        _table(found, shelf.root)
    output.done({"calibrations": entries})


def _table(found: list, root: Path) -> None:  # type: ignore[type-arg]
    from rich.table import Table
    from rich.text import Text

    from harness.render.tables import console, size_of

    if not found:
        click.echo(f"no calibrations in {clean(str(root))}; make one with: harness calibrate")
        return
    table = Table(header_style="dim", box=None, padding=(0, 2, 0, 0))
    for name, right in (
        ("id", False),
        ("base", True),
        ("KV a 10k", True),
        ("compute a 10k", True),
        ("valid to", True),
        ("error", True),
        ("measured on", False),
    ):
        table.add_column(name, justify="right" if right else "left")
    for calibration, variant in found:
        metadata, constants = calibration.metadata, calibration.constants
        error = metadata.quality.max_error
        table.add_row(
            Text(clean(calibration.id + (f"@{variant}" if variant else "")), style="bold"),
            size_of(constants.base_vram_gb),
            size_of(constants.kv_cache_gb_per_10k),
            size_of(constants.compute_gb_per_10k),
            f"{metadata.quality.valid_to:,}",
            "–" if error is None else f"{error:.2%}",
            Text(clean(", ".join(gpu.name for gpu in metadata.machine.gpus) or "host memory")),
        )
    console().print(table)


def _catalog(output: Output) -> None:
    from harness.store.catalog import find_catalog, read_catalog

    models = read_catalog(find_catalog(Path.cwd())).models
    if not output.as_json:
        for name, entry in models.items():
            engines = [
                word for word, there in (("ollama", entry.ollama), ("llama-server", entry.gguf), ("vllm", entry.vllm)) if there
            ]
            click.echo(f"{clean(name):<20} {', '.join(engines)}")
    output.done({"catalog": sorted(models)})
