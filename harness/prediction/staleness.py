"""Whether a calibration still describes what is here: engine, model, driver and GPU.

A part that cannot be read here, or was not recorded then, is unknown, and nothing is stale for that.
"""

from __future__ import annotations

import msgspec

from harness.model.calibration import Calibration
from harness.model.record import Gpu
from harness.prediction.drift import Change


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What a calibration would be made with now; ``None`` is unknown.

    ``image`` is the reference that would be used, ``image_digest`` what it means on this machine.
    """

    engine: str | None = None
    image: str | None = None
    image_digest: str | None = None
    model_digest: str | None = None
    gpus: tuple[Gpu, ...] | None = None


class Staleness(msgspec.Struct, frozen=True, kw_only=True):
    """``reasons`` make a calibration stale; ``unknown`` are the parts that could not be compared."""

    reasons: tuple[Change, ...]
    unknown: tuple[str, ...]


def age(calibration: Calibration, here: Environment) -> Staleness:
    """Compare what was recorded with what is here."""
    metadata = calibration.metadata
    if metadata.machine.meter == "import":
        return Staleness(reasons=(), unknown=("everything: the calibration was imported",))
    compared: list[tuple[str, str | None, str | None]] = []
    if metadata.machine.sandbox == "docker":
        compared.append(_image(calibration, here))
    else:
        compared.append(("engine", metadata.engine.version, here.engine))
    compared.append(("model digest", metadata.model.digest, here.model_digest))
    if metadata.machine.meter in ("nvml", "drm"):
        compared += _gpus(metadata.machine.gpus, here.gpus)
    known = [(name, old, new) for name, old, new in compared if old is not None and new is not None]
    return Staleness(
        reasons=tuple(Change(name=name, old=old, new=new) for name, old, new in known if old != new),
        unknown=tuple(name for name, old, new in compared if old is None or new is None),
    )


def _image(calibration: Calibration, here: Environment) -> tuple[str, str | None, str | None]:
    """By digest where both are known, else by reference: an image that is not pulled yet may still be another one by name."""
    engine = calibration.metadata.engine
    if engine.image_digest is not None and here.image_digest is not None:
        if engine.image != here.image and engine.image_digest != here.image_digest:
            return "image", engine.image, here.image
        return "image digest", engine.image_digest, here.image_digest
    if here.image is not None and engine.image != here.image:
        return "image", engine.image, here.image
    return "image digest", None, None


def _gpus(then: tuple[Gpu, ...], now: tuple[Gpu, ...] | None) -> list[tuple[str, str | None, str | None]]:
    if now is None or not then:
        return [("GPU", None, None), ("driver", None, None)]
    twins = [matching_gpu(gpu, now) for gpu in then]
    names = ", ".join(gpu.name for gpu in then)
    drivers = ", ".join(sorted({gpu.driver for gpu in then if gpu.driver})) or None
    if None in twins:
        return [("GPU", names, ", ".join(gpu.name for gpu in now) or "none")]
    found = ", ".join(sorted({gpu.driver for gpu in twins if gpu and gpu.driver})) or None
    return [("GPU", names, names), ("driver", drivers, found)]


def matching_gpu(gpu: Gpu, now: tuple[Gpu, ...]) -> Gpu | None:
    """The same GPU here, or else one of its kind."""
    same = [one for one in now if one.uuid == gpu.uuid and gpu.uuid is not None]
    return next(iter(same or [one for one in now if one.name == gpu.name]), None)
