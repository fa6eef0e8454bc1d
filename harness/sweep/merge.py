"""``harness merge``: calibrations and runs of several machines into one store, without loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from harness.engines.registry import policy_of
from harness.errors import BadInputError, ConfigError, HarnessError, NotFoundError, NotPermittedError
from harness.model.calibration import Calibration
from harness.options import Allowed
from harness.prediction.drift import Drift, compare
from harness.store.run_folder import copy_run, read_plain
from harness.store.store import RUNS, Store, read_record, stem_of, variant_of
from harness.store.trust import refuse
from harness.store.yaml import to_yaml
from harness.text import word_of

Action = Literal["added", "same", "replaced", "kept", "variant", "conflict", "unreadable", "refused"]


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one artifact.

    ``replaced``: it was newer than the one here and agrees with it; ``kept``: older, and agrees; ``variant``: of another
    machine or settings, filed beside the one here; ``conflict``: of the same machine, model and settings, and moved beyond the
    measurement error (``drift``), so the one here stays; ``refused``: it asks for what a file may not set.
    """

    source: str
    target: str
    action: Action
    drift: Drift | None = None
    reason: str | None = None


def merge(
    store: Store, sources: Sequence[Path], *, newer: bool = False, allowed: Allowed | None = None, here: Path | None = None
) -> Iterator[Merged]:
    """Merge stores into one; with ``newer`` a conflict is settled by the date. Every run is copied.

    A calibration that asks for what a file may not set (:mod:`harness.store.trust`) is not taken unless that is ``allowed``.
    Pins and the catalog are those of ``here``.

    Raises:
        NotFoundError: a source is no folder, or holds neither calibrations nor runs. CannotWriteError: the store.
    """
    shelves = [Store(source) for source in sources]
    for shelf in shelves:
        if not shelf.root.is_dir():
            raise NotFoundError(f"no such folder: {shelf.root}", code="no-such-store")
        if next(shelf.paths(), None) is None and next(shelf.runs(), None) is None:
            raise NotFoundError(f"no calibrations in {shelf.root}", code="no-such-store")
    for shelf in shelves:
        renamed = {}
        for folder in shelf.runs():
            try:
                name = _copy_run(folder, store)
            except (BadInputError, NotFoundError, ConfigError) as error:
                yield Merged(source=str(folder), target="", action="unreadable", reason=error.message)
                continue
            if name != folder.name:
                renamed[folder.name] = name
        for path in shelf.paths():
            try:
                calibration = shelf.read(path)
            except HarnessError as error:
                yield Merged(source=str(path), target="", action="unreadable", reason=error.message)
                continue
            try:
                refuse(calibration, here or Path.cwd(), allowed or Allowed(), path.name)
            except NotPermittedError as error:
                yield Merged(source=str(path), target="", action="refused", reason=f"{error.message}; {error.hint}")
                continue
            run = calibration.metadata.run
            if run in renamed:
                metadata = msgspec.structs.replace(calibration.metadata, run=renamed[run])
                calibration = msgspec.structs.replace(calibration, metadata=metadata)
            yield _take(store, path, calibration, newer=newer)


def _take(store: Store, source: Path, theirs: Calibration, *, newer: bool) -> Merged:
    target = store.root / source.parent.name / source.name
    action: Action = "added"
    if target.exists() and subject(store.read(target)) != subject(theirs):
        target = target.with_name(f"{stem_of(source)}@{_variant(source, theirs)}.yaml")
        action = "variant"
    if not target.exists():
        store.write(target, theirs)
        return Merged(source=str(source), target=str(target), action=action)
    ours = store.read(target)
    if to_yaml(ours) == to_yaml(theirs):
        return Merged(source=str(source), target=str(target), action="same")
    later = theirs.metadata.calibrated_at > ours.metadata.calibrated_at
    old, new = (ours, theirs) if later else (theirs, ours)
    drift = compare(old, new, (policy_of(old.engine), policy_of(new.engine)))
    if drift.moved and not newer:
        return Merged(source=str(source), target=str(target), action="conflict", drift=drift)
    if later:
        store.write(target, theirs)
    return Merged(source=str(source), target=str(target), action="replaced" if later else "kept", drift=drift)


def subject(calibration: Calibration) -> tuple[object, ...]:
    """What a calibration is of: two of one subject ought to agree, whatever the day."""
    metadata = calibration.metadata
    settings, machine = metadata.settings, metadata.machine
    return (
        metadata.model.digest,
        machine.target,
        tuple(gpu.name for gpu in machine.gpus),
        settings.num_parallel,
        settings.kv_cache_type,
        settings.flash_attention,
        tuple(sorted(settings.env.items())),
    )


def _variant(source: Path, calibration: Calibration) -> str:
    """A name for a calibration that finds its file taken: its own variant, the GPUs, and what it is of in eight digits."""
    gpus = calibration.metadata.machine.gpus
    named = word_of("+".join(gpu.name for gpu in gpus) or "host").strip("-")
    digest = hashlib.sha256(repr(subject(calibration)).encode()).hexdigest()[:8]
    return "-".join(part for part in (variant_of(source), named, digest) if part)


def _copy_run(run: Path, store: Store) -> str:
    """Copy a run's files; its name in the store, which differs where another run has that name already."""
    read_record(run)
    record = read_plain(run / "record.json")
    target = store.root / RUNS / run.name
    known = target / "record.json"
    if known.exists() and known.read_bytes() != record:
        target = target.with_name(f"{run.name}-{hashlib.sha256(record).hexdigest()[:8]}")
    if not (target / "record.json").exists():
        copy_run(run, target)
    return target.name
