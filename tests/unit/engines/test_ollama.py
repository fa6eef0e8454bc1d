"""The recipe of Ollama, against a stand-in that speaks its API."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.engines.base import Options, Source
from harness.engines.ollama.names import split_name
from harness.engines.ollama.recipe import VOLUME, Ollama
from harness.errors import NotFoundError, UnavailableError, UsageError
from harness.model.record import EngineVersion, Gpu, LoadRequest, Model, Target
from harness.prediction.memory import predict
from harness.sandboxes.base import GpuRequest, Mount, Site
from harness.units import MIB
from tests.support.calibrations import made_up

SITE = Site(sandbox="docker", host="0.0.0.0", port=8080)


HOST = Options(target="host", gpus=GpuRequest(mode="none"), timeout=30.0)


def named(name: str = "tiny") -> Source:
    return Source(model=Model(name=name), own_name=name)


@pytest.mark.parametrize(
    ("text", "name", "digest"),
    [
        ("qwen2.5", "qwen2.5", None),
        ("qwen2.5:0.5b", "qwen2.5:0.5b", None),
        ("someone/model:Q4_K_M", "someone/model:Q4_K_M", None),
        ("hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q8_0", "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q8_0", None),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c", None),
        ("tiny:latest@sha256:0123456789ab", "tiny:latest", "sha256:0123456789ab"),
        ("http://registry.lan:5000/a/b:c", "registry.lan:5000/a/b:c", None),
    ],
)
def test_names(text: str, name: str, digest: str | None) -> None:
    assert split_name(text) == (name, digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../../etc/passwd",
        "a/../b",
        "a b",
        "--help",
        "a:b:c",
        "$(id)",
        "a/b/c/d",
        "x" * 81,
        "tiny@sha256:xyz",
        "a\nb",
        "é",
    ],
)
def test_what_cannot_be_a_name_is_not_found_without_asking_anybody(text: str) -> None:
    with pytest.raises(NotFoundError):
        Ollama().resolve(text, HOST)


@pytest.mark.parametrize("text", ["gpt-oss:120b-cloud", "deepseek-v3.1:cloud"])
def test_a_model_in_the_cloud_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(NotFoundError, match="no memory to measure") as caught:
        Ollama().resolve(text, HOST)
    assert caught.value.code == "cloud-model"


@pytest.mark.parametrize(
    ("version", "limits"),
    [
        ("0.33.0", ((4096, 512), (32768, 1024), (1 << 30, 2048))),
        ("0.30.0-rc21", ((4096, 512), (32768, 1024), (1 << 30, 2048))),
        ("1.0.2", ((4096, 512), (32768, 1024), (1 << 30, 2048))),
        ("0.24.0", ()),
        ("0.9.6", ()),
    ],
)
def test_the_batch_rule_follows_the_version(version: str, limits: tuple[tuple[int, int], ...]) -> None:
    assert Ollama.policy.batch_limits(version) == limits


@pytest.mark.parametrize(
    ("version", "env", "projector", "reserve"),
    [
        ("0.33.0", {}, 0, 1024 * MIB),
        ("0.33.0", {}, 850 * MIB + 1, 1875 * MIB),
        ("0.33.0", {"LLAMA_ARG_FIT_TARGET": "300"}, 850 * MIB, 300 * MIB),
        ("0.33.0", {"LLAMA_ARG_FIT_TARGET": "300,2000"}, 0, 300 * MIB),
        ("0.33.0", {"LLAMA_ARG_FIT": "off"}, 0, 0),
        ("0.33.0", {"LLAMA_ARG_FIT": "disabled"}, 850 * MIB, 0),
        ("0.20.2", {}, 0, 457 * MIB),
        ("0.20.2", {"OLLAMA_GPU_OVERHEAD": str(100 * MIB)}, 0, 557 * MIB),
    ],
)
def test_what_placement_keeps_free(version: str, env: dict[str, str], projector: int, reserve: int) -> None:
    assert Ollama.policy.reserve_bytes(version, env, projector) == reserve


def test_two_types_of_cache_are_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="one type for the keys and the values"):
        Ollama().resolve("tiny", Options(kv_cache_type="q8_0/f16"))


def test_the_server_is_alone_and_offline_but_for_the_pull() -> None:
    launch = Ollama().launch(named(), None, Options(num_parallel=2, kv_cache_type="q8_0", flash_attention="on"), SITE)
    wanted = {
        "OLLAMA_HOST": "0.0.0.0:8080", "OLLAMA_NUM_PARALLEL": "2", "OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NO_CLOUD": "1", "OLLAMA_NOPRUNE": "1", "OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "1",
    }  # fmt: skip
    assert wanted.items() <= launch.env.items()
    assert "MALLOC_PERTURB_" not in launch.env, "a GPU run measures no host memory"
    assert launch.network
    assert launch.mounts == (Mount(kind="volume", source=VOLUME, target="/root/.ollama", read_only=False),)


def test_a_host_run_is_repeatable_and_its_speed_is_the_engines_own() -> None:
    points = Ollama().launch(named(), None, HOST, SITE).env
    speed = Ollama().launch(named(), LoadRequest(context=4096, purpose="speed"), HOST, SITE).env
    assert points["MALLOC_PERTURB_"] == "85"
    assert points["LLAMA_ARG_REPACK"] == "0"
    assert not {"MALLOC_PERTURB_", "LLAMA_ARG_REPACK", "OLLAMA_DEBUG"} & speed.keys()


def test_models_of_the_users_are_read_only_and_need_no_network(tmp_path: Path) -> None:
    (tmp_path / "models" / "manifests").mkdir(parents=True)
    folder = Options(models=str(tmp_path))
    launch = Ollama().launch(named(), None, folder, SITE)
    assert launch.mounts == (Mount(kind="bind", source=str(tmp_path / "models"), target="/ollama"),)
    assert not launch.network
    volume = Ollama().launch(named(), None, Options(models="ollama"), SITE)
    assert volume.mounts == (Mount(kind="volume", source="ollama", target="/ollama"),)
    assert volume.env["OLLAMA_MODELS"] == "/ollama/models"


def test_a_model_that_the_users_folder_lacks_is_not_found_at_once(tmp_path: Path) -> None:
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    options = Options(models=str(tmp_path))
    assert Ollama().resolve("tiny", options).own_name == "tiny"
    with pytest.raises(NotFoundError) as caught:
        Ollama().resolve("huge:70b", options)
    assert "library/tiny/latest" in str(caught.value.hint)
    with pytest.raises(NotFoundError):
        Ollama().resolve("tiny", Options(models=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("text", ["http://tiny", "https://registry.lan/a/b", "http://a/b/c/d"])
def test_http_is_of_a_registry_and_nothing_else(text: str) -> None:
    with pytest.raises(NotFoundError):
        split_name(text)


def test_kernels_that_the_driver_compiles_are_kept_with_the_models() -> None:
    """The root of its container is read-only, so the driver's own place for them is lost at every load."""
    launch = Ollama().launch(named(), None, Options(), SITE)
    assert launch.env["CUDA_CACHE_PATH"].startswith("/root/.ollama/")
    assert any(mount.target == "/root/.ollama" and not mount.read_only for mount in launch.mounts)


COMPUTE = b'time=1 level=INFO source=types.go:60 msg="inference compute" id=%s library=%s compute=""\n'


OLD = (
    b'time=1 level=WARN source=cuda_compat.go:65 msg="NVIDIA driver too old" device="NVIDIA GeForce RTX 3060" compute=8.6 '
    b'driver=546 required_driver="550 or newer"\n'
)


CARD = (Gpu(name="NVIDIA GeForce RTX 3060", driver="546.12"),)


def test_a_server_that_sees_no_gpu_is_refused_with_the_driver_and_what_to_do() -> None:
    refused = Ollama.policy.refuse_start(OLD + COMPUTE % (b"cpu", b"cpu"), CARD)
    assert isinstance(refused, UnavailableError)
    assert refused.code == "gpu-not-seen"
    assert "driver 546.12" in refused.message
    assert "needs 550 or newer" in refused.message
    assert "550 or newer" in str(refused.hint)
    bare = Ollama.policy.refuse_start(COMPUTE % (b"cpu", b"cpu"), CARD)
    assert bare is not None
    assert "nvidia-smi" in str(bare.hint)


def test_a_server_that_sees_a_gpu_or_does_not_say_is_not() -> None:
    for log in (b"", COMPUTE % (b"GPU-1", b"CUDA"), OLD + COMPUTE % (b"0", b"Vulkan")):
        assert Ollama.policy.refuse_start(log, CARD) is None


@pytest.mark.parametrize(
    ("version", "target", "word"),
    [
        ("0.12.11", "host", "Go heap"),
        ("0.12.11", "gpu", ""),
        ("0.33.0", "host", "prompt cache"),
        ("0.33.0", "gpu", "prompt cache"),
    ],
)
def test_what_a_server_of_the_users_takes_beside_is_named(version: str, target: Target, word: str) -> None:
    made = made_up()
    machine = msgspec.structs.replace(made.metadata.machine, target=target)
    metadata = msgspec.structs.replace(made.metadata, machine=machine, engine=EngineVersion(version=version))
    changed = msgspec.structs.replace(made, metadata=metadata)
    grown = Ollama.policy.may_grow(changed, predict(changed, 8192), {})
    assert word in ("" if grown is None else grown.what)
