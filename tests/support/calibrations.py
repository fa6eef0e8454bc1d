"""Calibrations of made-up models that obey known constants, and a store of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.record import EngineVersion, Gpu, Machine, Model, Record, Settings, Tensors
from harness.store.store import Store
from harness.units import GIB, MIB
from tests.support.records import WEIGHTS, load, record

DIGEST = f"sha256:{'ab12' * 16}"


def made_up(name: str = "made-up", gpu: str | None = "NVIDIA Test A", **changes: object) -> Calibration:
    """4 GiB of weights in 28 layers, 28 KiB of cache and 1 KiB of compute a token; 60 tokens/s on the GPU, 6 on the host."""
    gpus = () if gpu is None else (Gpu(name=gpu, driver="580.95.05"),)
    made: Record = msgspec.structs.replace(
        record(load(8192), load(16384), load(32768)),
        id=f"llama-server/{name}",
        model=Model(name=name, digest=DIGEST, train_context=131072, layers=28),
        machine=Machine(target="gpu", sandbox="process", meter="nvml", gpus=gpus),
        tensors=Tensors(layer_bytes=(138 * MIB,) * 28, output_bytes=WEIGHTS - 28 * 138 * MIB, embedding_bytes=0),
        reserve_bytes=GIB,
    )
    fitted = fit_record(msgspec.structs.replace(made, **changes))
    speeds = msgspec.structs.replace(
        fitted.metadata.performance, decode_tokens_per_s=60.0, host_decode_tokens_per_s=6.0, load_s=1.0
    )
    return msgspec.structs.replace(fitted, metadata=msgspec.structs.replace(fitted.metadata, performance=speeds))


def on_host(calibration: Calibration) -> Calibration:
    """The same, as if it had been measured in host memory."""
    machine = Machine(target="host", sandbox="process", meter="host")
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, machine=machine))


def with_settings(calibration: Calibration, **changes: object) -> Calibration:
    """The same with other settings."""
    metadata = calibration.metadata
    settings: Settings = msgspec.structs.replace(metadata.settings, **changes)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(metadata, settings=settings))


def with_version(calibration: Calibration, version: str) -> Calibration:
    """The same, of another build of the engine."""
    metadata = msgspec.structs.replace(calibration.metadata, engine=EngineVersion(version=version))
    return msgspec.structs.replace(calibration, metadata=metadata)


def store_of(root: Path, *calibrations: Calibration, **variants: Calibration) -> Store:
    """A store with default files, and variants by their names."""
    shelf = Store(root)
    for one in calibrations:
        shelf.write(shelf.path_of(one.engine, one.id.partition("/")[2]), one)
    for name, one in variants.items():
        shelf.write(shelf.path_of(one.engine, one.id.partition("/")[2], name), one)
    return shelf
