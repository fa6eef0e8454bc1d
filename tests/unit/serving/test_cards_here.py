"""Cards of this machine that are not those of a calibration, and models that an engine holds on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.engines.running import RunningModel, RunningServer
from harness.errors import UnavailableError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.model.gpu import LocalGpu
from harness.model.record import Gpu
from harness.serving.calibration_lookup import CalibrationFilter, read_question
from harness.serving.capacity import plan
from harness.serving.check import Assessment, check
from harness.units import GIB
from tests.support.calibrations import made_up, store_of, with_version


def card(key: str, free: float | None = 22.0, name: str = "NVIDIA Test A", **more: Any) -> LocalGpu:
    size = None if free is None else round(free * GIB)
    return LocalGpu(key=key, name=name, uuid=f"GPU-{key}", total_bytes=24 * GIB, free_bytes=size, **more)


class Box:
    """A machine with these cards and servers."""

    def __init__(self, patch: pytest.MonkeyPatch, *cards: LocalGpu, held: dict[str, float] | None = None) -> None:
        self.patch = patch
        patch.setattr(LocalMachine, "engine_version", lambda *_: None)
        self.holds(held or {})
        self.has(*cards)

    def has(self, *cards: LocalGpu) -> None:
        def gpus() -> tuple[LocalGpu, ...]:
            if not cards:
                raise UnavailableError("the driver sees no GPU")
            return cards

        self.patch.setattr("harness.meters.nvml.gpus", gpus)

    def holds(self, models: dict[str, float]) -> None:
        held = tuple(RunningModel(name=name, gpu_bytes=round(size * GIB)) for name, size in models.items())
        self.serves(RunningServer(pid=1, port=11434, version="0.33.0", models=held) if held else None)

    def serves(self, server: RunningServer | None) -> None:
        self.patch.setattr(LocalMachine, "running", lambda _, engine: (server,) if engine == "ollama" and server else ())


def ask(folder: Path, calibration: Calibration, gpu: str | None = None, context: int = 8192) -> Assessment:
    store = store_of(folder, calibration)
    wanted = CalibrationFilter(surroundings=True)
    (found,) = check([read_question(calibration.id, context)], store, LocalMachine(gpu), wanted=wanted).models
    return found


def ollama(name: str = "made-up") -> Calibration:
    return msgspec.structs.replace(with_version(made_up(name), "0.33.0"), id=f"ollama/{name}", engine="ollama")


def on_cards(calibration: Calibration, *cards: LocalGpu) -> Calibration:
    gpus = tuple(Gpu(name=one.name, uuid=one.uuid) for one in cards)
    machine = msgspec.structs.replace(calibration.metadata.machine, gpus=gpus)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, machine=machine))


def devices(found: Assessment) -> list[str]:
    assert found.details is not None
    return [one.name for one in found.details.devices]


def test_a_model_that_ollama_holds_is_ended_as_its_scheduler_would_and_its_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Box(monkeypatch, card("0", 3), held={"old:70b": 20})
    found = ask(tmp_path, ollama())
    assert found.verdict == "fits"
    assert found.details is not None
    first = found.details.reasons[0]
    assert (first.step, first.model) == ("evict-memory", "old:70b")
    assert found.details.available_bytes == 23 * GIB
    assert any("Ollama ends old:70b" in text for text in found.warnings)


def test_a_plan_counts_the_memory_of_models_that_the_engine_would_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Box(monkeypatch, card("0", 3), held={"old:70b": 20})
    for calibration, fits in ((ollama(), True), (made_up(), False)):
        found = plan([], store_of(tmp_path / str(fits), calibration), LocalMachine())
        (row,) = found.memories[0].rows
        assert any("ends old:70b, which is loaded now, for made-up" in one for one in found.warnings) == fits
        assert (row.verdict.verdict == "fits", bool(row.largest_context)) == (fits, fits)
    Box(monkeypatch, card("0", 23))
    (memory,) = plan([], store_of(tmp_path / "empty", ollama()), LocalMachine()).memories
    assert memory.rows[0].largest_context == 131_072


def test_a_model_that_ollama_has_room_beside_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Box(monkeypatch, card("0", 22), held={"small:1b": 1})
    found = ask(tmp_path, ollama())
    assert found.details is not None
    assert (found.verdict, found.details.available_bytes) == ("fits", 22 * GIB)
    assert not any(one.step.startswith("evict") for one in found.details.reasons)


def test_a_fourth_model_ends_the_first_and_no_engine_ends_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Box(monkeypatch, card("0", 21), held={"a": 1, "b": 1, "c": 1})
    found = ask(tmp_path, ollama())
    assert found.details is not None
    assert [(one.step, one.model) for one in found.details.reasons if one.step.startswith("evict")] == [("evict-limit", "a")]
    other = ask(tmp_path / "other", made_up())
    assert other.details is not None
    assert other.details.available_bytes == 21 * GIB


def set_so(**variables: str) -> RunningServer:
    return RunningServer(pid=1, port=11434, version="0.33.0", settings=variables, readable=True)


def test_the_switches_of_a_running_ollama_are_those_of_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(monkeypatch, card("0", 22), card("1", 20))
    assert devices(ask(tmp_path, ollama())) == ["GPU0"]
    box.serves(set_so(OLLAMA_SCHED_SPREAD="1"))
    assert devices(ask(tmp_path, ollama())) == ["GPU0", "GPU1"]
    spread = ollama("spread")
    settings = msgspec.structs.replace(spread.metadata.settings, env={"OLLAMA_SCHED_SPREAD": "1"})
    spread = msgspec.structs.replace(spread, metadata=msgspec.structs.replace(spread.metadata, settings=settings))
    box.serves(set_so(OLLAMA_MODELS="/models"))
    assert devices(ask(tmp_path, spread)) == ["GPU0"]


@pytest.mark.parametrize(
    ("version", "variable", "cards", "named"),
    [
        ("0.33.0", "OLLAMA_GPU_OVERHEAD", 1, False),
        ("0.24.0", "OLLAMA_GPU_OVERHEAD", 1, True),
        ("0.33.0", "LLAMA_ARG_FIT_TARGET", 1, True),
        ("0.24.0", "LLAMA_ARG_FIT_TARGET", 1, False),
        ("0.33.0", "CUDA_VISIBLE_DEVICES", 1, False),
        ("0.33.0", "CUDA_VISIBLE_DEVICES", 2, True),
    ],
)
def test_what_a_running_ollama_is_set_to_and_no_calculation_covers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, variable: str, cards: int, named: bool
) -> None:
    Box(monkeypatch, *(card(str(index), 22) for index in range(cards))).serves(set_so(**{variable: "1"}))
    found = ask(tmp_path, msgspec.structs.replace(with_version(ollama(), version)))
    assert (found.verdict == "unknown") == named
    assert (f"{variable}=1 of the Ollama that runs here (port 11434)" in (found.reason or "")) == named


def test_cards_that_the_calibration_never_saw_are_judged_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Box(monkeypatch, card("0", 3, "NVIDIA Test B"), card("1", 3, "NVIDIA Test C"))
    found = ask(tmp_path, made_up())
    assert devices(found) == ["GPU0", "GPU1"]
    assert any("NVIDIA Test A, here it is NVIDIA Test B + NVIDIA Test C" in text for text in found.warnings)
    assert found.details is not None
    assert found.details.source == "derived"


def test_one_card_whose_free_memory_is_not_known_makes_the_answer_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Box(monkeypatch, card("0", 22), card("1", None, why="the driver counts no memory of this card"))
    found = ask(tmp_path, made_up())
    assert (found.verdict, found.reason) == ("unknown", "the driver counts no memory of this card")


def test_more_cards_than_the_engine_uses_help_nothing_and_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Box(monkeypatch, card("0", 22), card("1", 20), card("2", 18))
    found = ask(tmp_path, ollama())
    assert devices(found) == ["GPU0"]
    assert found.details is not None
    assert found.details.available_bytes == 22 * GIB


def test_a_process_uses_one_instance_of_a_split_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA enumerates a single compute instance: two halves of a card are no two cards."""
    halves = card("0:0", 3.5, mig=True), card("0:1", 9.5, mig=True)
    Box(monkeypatch, *halves)
    assert ask(tmp_path, made_up()).verdict == "offload"
    assert ask(tmp_path, made_up(), gpu="0:1").verdict == "fits"


def test_a_card_that_has_gone_since_the_plan_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(monkeypatch, card("0", 22), card("1", 22))
    two = on_cards(made_up(), card("0"), card("1"))
    assert ask(tmp_path, two).verdict == "fits"
    box.has(card("0", 22))
    one_left = ask(tmp_path, two)
    assert (one_left.verdict, one_left.reason) == ("unknown", "calibrated on 2 devices, to be judged on one device")
    box.has()
    none_left = ask(tmp_path, two)
    assert (none_left.verdict, none_left.reason) == ("unknown", "the driver sees no GPU")


def test_cards_of_another_vendor_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration by NVIDIA's driver is of an engine that computes with CUDA."""
    Box(monkeypatch, card("0", 3))
    radeon = LocalGpu(key="0000:03:00.0", name="AMD Test", total_bytes=24 * GIB, free_bytes=24 * GIB)
    monkeypatch.setattr("harness.meters.drm_devices.drm_gpus", lambda: (radeon,))
    found = ask(tmp_path, made_up())
    assert (found.verdict, devices(found)) == ("offload", ["GPU0"])


def test_the_second_card_is_judged_where_it_is_asked_for_whatever_card_was_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Box(monkeypatch, card("0", 22), card("1", 3))
    of_first = on_cards(made_up(), card("0"))
    assert ask(tmp_path, of_first, gpu="0").verdict == "fits"
    second = ask(tmp_path, of_first, gpu="1")
    assert (second.verdict, devices(second)) == ("offload", ["GPU1"])


def test_an_index_of_the_driver_is_no_name_of_the_engines_own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vulkan and CUDA may count cards in different orders, so a bare index means NVIDIA's alone."""
    Box(monkeypatch)
    listed = card("Vulkan0", 3, "Test B"), card("Vulkan1", 22, "Test A")
    monkeypatch.setattr("harness.engines.llama_server.recipe.LlamaServer.devices", lambda *_: listed)
    logged = made_up()
    machine = msgspec.structs.replace(logged.metadata.machine, meter="log")
    logged = msgspec.structs.replace(logged, metadata=msgspec.structs.replace(logged.metadata, machine=machine))
    by_index = ask(tmp_path, logged, gpu="0")
    assert (by_index.verdict, by_index.reason) == (
        "unknown", "there is no GPU 0; there are: Vulkan0 (Test B), Vulkan1 (Test A)",
    )  # fmt: skip
    assert ask(tmp_path, logged, gpu="Vulkan1").verdict == "fits"
    assert ask(tmp_path, logged, gpu="Vulkan0").verdict == "offload"
