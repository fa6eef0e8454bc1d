"""What is here now, part by part, without pulling or starting anything: images, engines, models, GPUs."""

from __future__ import annotations

import functools
from contextlib import suppress
from pathlib import Path

from harness.engines.base import Options
from harness.engines.registry import policy_of, recipe_of
from harness.errors import HarnessError
from harness.inventory.backend import resolve_name
from harness.inventory.digests import cached_sha256, file_of
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.model.record import Gpu
from harness.model.trace import MeterName
from harness.options import Overrides
from harness.prediction.staleness import Environment
from harness.sandboxes.base import SandboxName
from harness.sandboxes.container_config import repository
from harness.store.catalog import find_catalog, pinned_image, read_catalog
from harness.store.store import Store, read_record
from harness.text import release


class Installed:
    """Looks each part up once. A part that cannot be read is ``None``."""

    def __init__(self, store: Store, given: Overrides, folder: Path) -> None:
        self.store, self.given, self.folder = store, given, folder
        self.catalog = read_catalog(find_catalog(folder))
        self._machine = LocalMachine()
        self.image_digest = functools.cache(self._image_digest)
        self.engine_version = functools.cache(self._engine_version)

    def here(self, calibration: Calibration) -> Environment:
        """What this calibration would be made with now."""
        metadata = calibration.metadata
        in_docker = metadata.machine.sandbox == "docker"
        image = self.image(calibration) if in_docker else None
        return Environment(
            engine=None if in_docker or self._is_unnamed(calibration) else self.engine_version(calibration.engine),
            image=image,
            image_digest=None if image is None else self.image_digest(image),
            model_digest=self.model_digest(calibration),
            gpus=self.gpus_of(metadata.machine.meter),
        )

    def _is_unnamed(self, calibration: Calibration) -> bool:
        """Whether it was measured with a program that the user named, and names now no more: which one it is is not known."""
        return calibration.metadata.engine.named and self.given.engine_binary is None

    def image(self, calibration: Calibration) -> str | None:
        """The image that would be used.

        It is the one asked for, else that of the server which runs here, else one that was named then, else the pin; a server's
        and the pin only where the calibration is of the pin's repository.
        """
        engine = calibration.metadata.engine
        then = engine.image
        if self.given.image is not None or then is None:
            return self.given.image
        pinned = pinned_image(calibration.engine, self.folder)
        if pinned is None or repository(pinned) != repository(then):
            return then
        running = self.running_version(calibration.engine)
        tagged = pinned.partition("@")[0].rpartition(":")[2]
        if running is not None and release(tagged) is not None:  # the repository's tags are versions
            return then if running == engine.version else f"{repository(pinned)}:{running}"
        return then if engine.named else pinned

    def model_path(self, calibration: Calibration) -> Path | None:
        """The GGUF of a calibration.

        By the catalog, below ``--models``, in this folder, where its own log says, or where its digest was last seen.
        """
        name = calibration.metadata.model.name
        places = [Path(name)]
        if self.given.models is not None:
            places.insert(0, Path(self.given.models) / name)
        with suppress(HarnessError):
            if name in self.catalog.models:
                places.insert(0, Path(self.own_name(calibration)))
            elif calibration.metadata.run is not None:
                loads = read_record(self.store.run_folder(calibration.metadata.run)).loads
                logged = [load.facts.model for load in loads if load.facts is not None and load.facts.model]
                by_file = policy_of(calibration.engine).loads_files  # others load blobs of a server that is gone
                places += [Path(one) for one in logged if by_file or one.endswith(".gguf")]
        if (digest := calibration.metadata.model.digest) is not None and (seen := file_of(digest)) is not None:
            places.append(seen)
        return next((self.folder / place for place in places if (self.folder / place).is_file()), None)

    def own_name(self, calibration: Calibration) -> str:
        """What the engine calls the model; of a GGUF in the catalog its path.

        Raises:
            NotFoundError: the catalog knows the model, and not for this engine.
        """
        return resolve_name(calibration.metadata.model.name, recipe_of(calibration.engine), self.catalog, Options())

    def model_digest(self, calibration: Calibration) -> str | None:
        """The digest of the weights that would be loaded now."""
        try:
            engine = recipe_of(calibration.engine)
            if engine.policy.loads_files or calibration.metadata.model.name.endswith(".gguf"):
                path = self.model_path(calibration)
                return None if path is None else cached_sha256(path.resolve())
            place: SandboxName = "process" if calibration.metadata.machine.sandbox == "process" else "docker"
            options = Options(models=self.given.models, sandbox=place)
            return engine.weights_digest(self.own_name(calibration), options, _volume_folder)
        except (OSError, HarnessError):
            return None

    def gpus_of(self, meter: MeterName) -> tuple[Gpu, ...] | None:
        """The GPUs that a meter would read; ``None`` where it reads none, or they cannot be listed."""
        if meter == "drm":
            from harness.meters.drm_devices import drm_gpus

            return tuple(gpu.recorded for gpu in drm_gpus())
        return self.gpus() if meter == "nvml" else None

    def gpus(self) -> tuple[Gpu, ...] | None:
        """The NVIDIA GPUs; ``None`` where the driver cannot be asked."""
        found = self._machine.nvidia
        return None if isinstance(found, HarnessError) else tuple(gpu.recorded for gpu in found)

    def _image_digest(self, reference: str) -> str | None:
        from harness.sandboxes.docker import local_image

        try:
            image = local_image(reference)
        except HarnessError:
            return None
        return None if image is None else image.digest

    def running_version(self, name: EngineName) -> str | None:
        """The version of a server of an engine that runs on this machine, whoever started it."""
        return next((one.version for one in self._machine.running(name) if release(one.version) is not None), None)

    def _engine_version(self, name: EngineName) -> str | None:
        try:
            return recipe_of(name).version(Options(engine_binary=self.given.engine_binary), None).version
        except HarnessError:
            return None


def _volume_folder(name: str) -> str | None:
    from harness.sandboxes.docker_client import Daemon

    with Daemon() as daemon:
        return daemon.volume_folder(name)
