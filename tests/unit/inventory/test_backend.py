"""What ``auto`` comes to on machines of different kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engines.base import Options
from harness.engines.registry import recipe_of
from harness.errors import ConfigError, UnavailableError, UsageError
from harness.inventory.backend import EngineChoice, choose, choose_engine
from harness.options import SandboxChoice
from harness.sandboxes.base import GpuRequest
from harness.store.catalog import pinned_image

NONE = GpuRequest(mode="none")


@pytest.fixture
def gpu_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where Docker can give a container an NVIDIA GPU."""
    monkeypatch.setattr("harness.inventory.backend.docker_gpu_obstacle", lambda *_: None)


@pytest.mark.parametrize(
    ("wanted", "sandbox", "options", "engine"),
    [
        ("auto", "auto", Options(), "ollama"),
        ("auto", "docker", Options(), "ollama"),
        ("auto", "process", Options(), "llama-server"),
        ("auto", "auto", Options(gpus=NONE), "llama-server"),
        ("auto", "auto", Options(engine_binary="./llama-server"), "llama-server"),
        ("llama-server", "auto", Options(), "llama-server"),
    ],
)
def test_auto_is_ollama_where_a_container_can_have_the_gpu(
    gpu_box: None, wanted: EngineChoice, sandbox: SandboxChoice, options: Options, engine: str
) -> None:
    chosen, reasons = choose_engine(wanted, sandbox, options)
    assert chosen == engine
    assert bool(reasons) is (wanted == "auto"), "what was not asked for is said, with its reason"


def test_auto_says_why_it_is_not_ollama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.inventory.backend.docker_gpu_obstacle", lambda *_: "there is no NVIDIA GPU")
    chosen, (reason,) = choose_engine("auto", "auto", Options())
    assert chosen == "llama-server"
    assert "there is no NVIDIA GPU" in reason


def test_ollama_without_a_gpu_is_measured_on_host_memory() -> None:
    choice = choose(recipe_of("ollama"), "auto", Options(gpus=NONE))
    assert (choice.sandbox, choice.target, choice.meter, choice.gpus) == ("docker", "host", "host", ())


def test_ollama_runs_in_no_process() -> None:
    with pytest.raises(UsageError):
        choose(recipe_of("ollama"), "process", Options(gpus=NONE))


def test_a_missing_gpu_says_what_works_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(options: Options) -> None:
        raise UnavailableError("there is no NVIDIA driver to ask")

    monkeypatch.setattr("harness.inventory.backend.nvidia_gpus", nothing)
    with pytest.raises(UnavailableError) as caught:
        choose(recipe_of("ollama"), "auto", Options())
    assert "--gpus none" in str(caught.value.hint)


def test_a_gpu_that_was_asked_for_is_never_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.llama_server.recipe.LlamaServer.devices", lambda *_: {})
    with pytest.raises(UnavailableError, match="no such GPU: 0"):
        choose(recipe_of("llama-server"), "process", Options(gpus=GpuRequest(mode="ids", ids=("0",))))


def test_images_are_pinned_where_the_catalog_is(tmp_path: Path) -> None:
    own = pinned_image("ollama", tmp_path)
    assert own is not None
    assert own.startswith("ollama/ollama:")
    assert "@" not in own, "tags: a digest is known only once a run has resolved it"
    (tmp_path / "images").mkdir()
    pins = tmp_path / "images" / "pins.yaml"
    pins.write_text("ollama: 'mirror/ollama:1'")
    assert pinned_image("ollama", tmp_path) == "mirror/ollama:1"
    assert pinned_image("vllm", tmp_path) is None
    pins.write_text("[1]")
    with pytest.raises(ConfigError):
        pinned_image("ollama", tmp_path)
