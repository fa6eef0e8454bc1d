"""What ``auto`` comes to on machines of different kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engines.base import Options, Source
from harness.engines.registry import recipe_of
from harness.errors import ConfigError, NotFoundError, UnavailableError, UsageError
from harness.inventory.backend import EngineChoice, choose, choose_engine, choose_sandbox
from harness.model.gpu import LocalGpu
from harness.model.record import Model
from harness.options import SandboxChoice
from harness.sandboxes.base import GpuRequest
from harness.store.catalog import pinned_image

NONE = GpuRequest(mode="none")
ALL = GpuRequest()


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
    for place in ("docker", "process"):
        choice = choose(recipe_of("ollama"), place, Options(gpus=NONE))
        assert (choice.sandbox, choice.target, choice.meter, choice.gpus) == (place, "host", "host", ())


@pytest.mark.parametrize(
    ("sandbox", "options"),
    [
        ("process", Options(image="ollama/ollama:1")),
        ("docker", Options(engine_binary="/usr/bin/ollama")),
        ("auto", Options(image="ollama/ollama:1", engine_binary="/usr/bin/ollama")),
    ],
)
def test_an_option_of_the_other_sandbox_is_refused_and_not_ignored(sandbox: SandboxChoice, options: Options) -> None:
    with pytest.raises(UsageError):
        choose_sandbox(recipe_of("ollama"), sandbox, options)


@pytest.mark.parametrize(
    ("docker", "installed", "gpus", "place"),
    [
        (None, True, NONE, "docker"),
        ("no daemon", True, NONE, "process"),
        ("no daemon", True, ALL, "process"),
        ("no daemon", False, ALL, None),
        ("no daemon", False, NONE, None),
    ],
)
def test_ollama_runs_in_docker_else_as_the_program_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, docker: str | None, installed: bool, gpus: GpuRequest, place: str | None
) -> None:
    monkeypatch.setattr("harness.inventory.backend.docker_obstacle", lambda: docker)
    monkeypatch.setattr("harness.inventory.backend.docker_gpu_obstacle", lambda: docker)
    monkeypatch.setattr("harness.engines.ollama.recipe.Ollama.installed", lambda *_: (Path("/o"),) if installed else ())
    if place is None:
        with pytest.raises(UnavailableError) as caught:
            choose_sandbox(recipe_of("ollama"), "auto", Options(gpus=gpus))
        assert "no daemon" in caught.value.message
        return
    chosen, reasons = choose_sandbox(recipe_of("ollama"), "auto", Options(gpus=gpus))
    assert chosen == place
    assert bool(reasons) is (place == "process"), "why it is not the usual one is said"


@pytest.mark.parametrize("obstacle", [None, "it has no such model"])
def test_auto_is_this_machine_s_ollama_where_docker_has_no_gpu(monkeypatch: pytest.MonkeyPatch, obstacle: str | None) -> None:
    def resolve(self: object, name: str, options: Options) -> Source:
        if obstacle is not None:
            raise NotFoundError(obstacle)
        return Source(model=Model(name=name))

    monkeypatch.setattr("harness.inventory.backend.docker_gpu_obstacle", lambda *_: "no Docker daemon answers")
    monkeypatch.setattr(
        "harness.inventory.backend.nvidia_gpus", lambda *_: ((LocalGpu(key="0", name="NVIDIA Test A"),), "nvml", "by NVML")
    )
    monkeypatch.setattr("harness.engines.ollama.recipe.Ollama.installed", lambda *_: (Path("/usr/bin/ollama"),))
    monkeypatch.setattr("harness.engines.ollama.recipe.Ollama.resolve", resolve)
    for sandbox, told in (("auto", "no Docker daemon answers"), ("process", "processes were asked for")):
        chosen, (reason,) = choose_engine("auto", sandbox, Options(), "qwen2.5:0.5b")  # type: ignore[arg-type]
        assert chosen == ("ollama" if obstacle is None else "llama-server")
        assert told in reason
        assert (obstacle or "/usr/bin/ollama") in reason


def test_a_missing_gpu_says_what_works_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(options: Options) -> None:
        raise UnavailableError("no NVIDIA driver found")

    monkeypatch.setattr("harness.inventory.backend.nvidia_gpus", nothing)
    with pytest.raises(UnavailableError) as caught:
        choose(recipe_of("ollama"), "docker", Options())
    assert "--gpus none" in str(caught.value.hint)


def test_a_gpu_that_was_asked_for_is_never_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.llama_server.recipe.LlamaServer.devices", lambda *_: ())
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
