"""What is here now, part by part, without pulling or starting anything: images, engines, models, GPUs."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from harness.catalog import cache_folder, find_catalog, read_catalog
from harness.core.calibration import Calibration
from harness.core.facts import EngineName
from harness.core.record import Gpu
from harness.core.stale import Here
from harness.engines import engine_named, gguf
from harness.engines.base import Options
from harness.errors import HarnessError
from harness.store import Store, read_record, write_atomically
from harness.units import gib
from harness.workflows.choose import resolve_name


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the user says about here, for all calibrations alike."""

    image: str | None = None
    binary: str | None = None
    models: str | None = None
    gpus: str | None = None
    env: dict[str, str] = {}
    timeout: float = 600.0


class Finder:
    """Looks each part up once. A part that cannot be read is ``None``."""

    def __init__(self, store: Store, given: Given, folder: Path) -> None:
        self.store, self.given, self.folder = store, given, folder
        self.catalog = read_catalog(find_catalog(folder))
        self.gpus = functools.cache(self._gpus)
        self.image_digest = functools.cache(self._image_digest)
        self.engine_version = functools.cache(self._engine_version)

    def here(self, calibration: Calibration) -> Here:
        """What this calibration would be made with now."""
        metadata = calibration.metadata
        in_docker = metadata.machine.sandbox == "docker"
        image = self.image(calibration) if in_docker else None
        return Here(
            engine=None if in_docker else self.engine_version(calibration.engine),
            image=image,
            image_digest=None if image is None else self.image_digest(image),
            model_digest=self.model_digest(calibration),
            gpus=self.gpus() if metadata.machine.meter == "nvml" else None,
        )

    def image(self, calibration: Calibration) -> str | None:
        """The image that would be used: the one asked for, else the one that it was measured with."""
        return self.given.image or calibration.metadata.engine.image

    def model_path(self, calibration: Calibration) -> Path | None:
        """The GGUF of a calibration: by the catalog, below ``--models``, where its own log says, or in this folder."""
        name = calibration.metadata.model.name
        places = [Path(name)]
        if self.given.models is not None:
            places.insert(0, Path(self.given.models) / name)
        try:
            engine = engine_named(calibration.engine)
            if name in self.catalog.models:
                places.insert(0, Path(resolve_name(name, engine, self.catalog, Options(binary=self.given.binary))[0]))
            elif calibration.metadata.run is not None:
                loads = read_record(self.store.run_folder(calibration.metadata.run)).loads
                places += [Path(load.facts.model) for load in loads if load.facts is not None and load.facts.model]
        except HarnessError:
            pass
        return next((self.folder / place for place in places if (self.folder / place).is_file()), None)

    def model_digest(self, calibration: Calibration) -> str | None:
        """The digest of the weights that would be loaded now."""
        if calibration.engine != "llama-server":
            return None
        path = self.model_path(calibration)
        try:
            return None if path is None else cached_sha256(path.resolve())
        except OSError:
            return None

    def _gpus(self) -> tuple[Gpu, ...] | None:
        from harness.meters.nvml import gpus

        try:
            found = gpus()
        except HarnessError:
            return None
        return tuple(
            Gpu(
                name=gpu.name,
                uuid=gpu.uuid,
                memory_gb=gib(gpu.memory_bytes) if gpu.memory_bytes else None,
                driver=gpu.driver,
            )
            for gpu in found
        )

    def _image_digest(self, reference: str) -> str | None:
        from harness.sandboxes.docker import local_image

        try:
            image = local_image(reference)
        except HarnessError:
            return None
        return None if image is None else image.digest

    def _engine_version(self, name: EngineName) -> str | None:
        try:
            return engine_named(name).version(Options(binary=self.given.binary), None).version
        except HarnessError:
            return None


def cached_sha256(path: Path) -> str:
    """A file's SHA-256, kept in the cache folder by size and time: models have tens of gigabytes."""
    state = path.stat()
    key, seen = str(path), [state.st_size, state.st_mtime_ns]
    cache = cache_folder() / "digests.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(cache.read_text()))
    with suppress(KeyError, TypeError, IndexError):
        if known[key][0] == seen:
            return str(known[key][1])
    digest = gguf.sha256(path)
    with suppress(HarnessError):  # without a cache it is hashed again next time
        write_atomically(cache, json.dumps({**known, key: [seen, digest]}, indent=1).encode())
    return digest
