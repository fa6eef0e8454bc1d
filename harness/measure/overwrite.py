"""Whether a calibration may take the place of the one on disk."""

from __future__ import annotations

from pathlib import Path

from harness.engines.base import Source
from harness.errors import CannotWriteError
from harness.model.facts import LoadFacts
from harness.model.record import Machine, Settings
from harness.store.store import Store


def refuse_overwrite(
    path: Path, source: Source, settings: Settings, machine: Machine, store: Store, facts: LoadFacts | None = None
) -> None:
    """Refuse to replace a calibration of another GPU, model or settings.

    What was left to the engine (flash attention, the physical batch) is known from the ``facts`` of the first load.

    Raises:
        CannotWriteError: it would; ``--variant`` or ``--force`` is the way on.
    """
    if not path.exists():
        return
    old = store.read(path).metadata
    differs = []
    if old.weights == "full" and source.weights == "header":
        differs.append("source: of the weights themselves, not of a header")
    if old.model.digest and source.model.digest and old.model.digest != source.model.digest:
        differs.append("model digest")
    elif old.model.name != source.model.name and None in (old.model.digest, source.model.digest):
        differs.append(f"model ({old.model.name}: the names share a file)")
    if [gpu.name for gpu in old.machine.gpus] != [gpu.name for gpu in machine.gpus]:
        differs.append("GPU")
    if old.machine.target != machine.target:
        differs.append("target")
    if old.settings.num_parallel != settings.num_parallel or old.settings.env != settings.env:
        differs.append("settings")
    if settings.num_batch is not None and old.settings.num_batch not in (None, settings.num_batch):
        differs.append("physical batch")
    if settings.kv_cache_type not in ("auto", old.settings.kv_cache_type):
        differs.append("KV cache type")
    flash = settings.flash_attention or (facts.flash_attention if facts else None)
    if flash is not None and old.settings.flash_attention not in (None, flash):
        differs.append("flash attention")
    batches = {band.num_batch for band in old.bands}
    if facts is not None and facts.num_batch is not None and not batches & {None, facts.num_batch}:
        differs.append("physical batch")
    if differs:
        raise CannotWriteError(
            f"{path} is a calibration of another {', '.join(dict.fromkeys(differs))}",
            hint="keep both with --variant NAME, or replace it with --force",
            code="would-overwrite",
        )
