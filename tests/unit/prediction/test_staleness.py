"""What makes a calibration stale, and what is merely unknown."""

from __future__ import annotations

import msgspec

from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.record import EngineVersion, Gpu, Machine
from harness.prediction.staleness import Environment, age
from tests.support.records import load, record

CARD = Gpu(name="NVIDIA Card", uuid="GPU-1", memory_gb=12.0, driver="550.1")
IMAGE = EngineVersion(version="0.33.0", image="ollama/ollama:0.33.0", image_digest="sha256:a")


def made(engine: EngineVersion = IMAGE, *gpus: Gpu, sandbox: str = "docker") -> Calibration:
    calibration = fit_record(record(load(8192), load(16384)))
    machine = Machine(target="gpu", sandbox=sandbox, meter="nvml", gpus=gpus or (CARD,))  # type: ignore[arg-type]
    model = msgspec.structs.replace(calibration.metadata.model, digest="sha256:m")
    return msgspec.structs.replace(
        calibration, metadata=msgspec.structs.replace(calibration.metadata, engine=engine, machine=machine, model=model)
    )


def reasons(calibration: Calibration, **here: object) -> list[tuple[str, str | None, str | None]]:
    same: dict[str, object] = {"image": IMAGE.image, "image_digest": "sha256:a", "model_digest": "sha256:m", "gpus": (CARD,)}
    found = age(calibration, Environment(**{**same, **here}))  # type: ignore[arg-type]
    return [(change.name, change.old, change.new) for change in found.reasons]


def test_what_is_as_it_was_is_not_stale() -> None:
    assert reasons(made()) == []


def test_each_part_that_differs_is_named() -> None:
    assert reasons(made(), image_digest="sha256:b") == [("image digest", "sha256:a", "sha256:b")]
    assert reasons(made(), image="ollama/ollama:0.34.0", image_digest="sha256:b") == [
        ("image", "ollama/ollama:0.33.0", "ollama/ollama:0.34.0")
    ]
    assert reasons(made(), model_digest="sha256:n") == [("model digest", "sha256:m", "sha256:n")]
    newer = msgspec.structs.replace(CARD, driver="560.2")
    assert reasons(made(), gpus=(newer,)) == [("driver", "550.1", "560.2")]
    other = Gpu(name="NVIDIA Other", uuid="GPU-2", driver="550.1")
    assert reasons(made(), gpus=(other,)) == [("GPU", "NVIDIA Card", "NVIDIA Other")]
    process = made(EngineVersion(version="b1"), sandbox="process")
    assert reasons(process, image=None, image_digest=None, engine="b2") == [("engine", "b1", "b2")]


def test_another_name_of_the_same_image_and_another_card_of_the_same_kind_are_the_same() -> None:
    assert reasons(made(), image="registry.example/ollama:stable") == []
    assert reasons(made(), gpus=(msgspec.structs.replace(CARD, uuid="GPU-9"),)) == []


def test_an_image_that_is_not_pulled_is_stale_by_its_name_alone() -> None:
    assert reasons(made(), image="ollama/ollama:0.34.0", image_digest=None)[0][0] == "image"
    assert reasons(made(), image_digest=None) == []


def test_a_part_that_cannot_be_read_is_unknown_and_never_stale() -> None:
    nothing = age(made(), Environment())
    assert nothing.reasons == ()
    assert set(nothing.unknown) == {"image digest", "model digest", "GPU", "driver"}
    unrecorded = made(EngineVersion(), Gpu(name="NVIDIA Card"))
    assert reasons(unrecorded) == []
