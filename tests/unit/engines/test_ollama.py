"""The recipe of Ollama, against a stand-in that speaks its API."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from harness.engines import gguf
from harness.engines.base import Options, Source
from harness.engines.ollama.models import pull
from harness.engines.ollama.names import over_plain_http, split_name
from harness.engines.ollama.recipe import VOLUME, Ollama
from harness.errors import BadInputError, BusyError, EngineError, HarnessError, NotFoundError, UnavailableError
from harness.model.record import EngineVersion, Gpu, LoadRequest, Model, Target
from harness.sandboxes.base import GpuRequest, Mount, Site
from harness.units import MIB
from tests.support.calibrations import made_up
from tests.support.ollama import TRAIN_CONTEXT, registry, standin

pytestmark = pytest.mark.process

SITE = Site(sandbox="docker", host="0.0.0.0", port=8080)
HOST = Options(target="host", gpus=GpuRequest(mode="none"), timeout=30.0)


def quiet(what: str, done: float, total: float | None) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A stand-in that does no wrong, and ``tiny`` pulled into it."""
    with standin(tmp_path_factory.mktemp("ollama")) as client:
        pull(client, "tiny", quiet)
        yield client


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


def test_a_registry_without_tls_is_asked_for_by_the_name_alone(tmp_path: Path) -> None:
    assert [over_plain_http(f"{scheme}registry.lan:5000/library/tiny") for scheme in ("", "http://")] == [False, True]
    with standin(tmp_path) as client:
        for name in ("http://registry.lan:5000/library/tiny", "tiny"):
            with contextlib.suppress(NotFoundError):
                Ollama().prepare(client, named(name), Options(target="host"), quiet)
    lines = re.findall(r'msg="pull" model=(\S+) insecure=(\S+)', (tmp_path / "log").read_text())
    assert lines == [("registry.lan:5000/library/tiny", "True"), ("tiny", "False")]


def test_what_is_lent_is_not_said_to_be_pulled(tmp_path: Path) -> None:
    with standin(tmp_path) as client, pytest.raises(NotFoundError) as caught:
        Ollama().prepare(client, named("gone"), Options(models="ollama"), quiet)
    assert "network" not in str(caught.value.hint)
    assert "ollama pull" in str(caught.value.hint)


def test_a_model_that_is_here_is_lent_read_only_and_not_pulled(tmp_path: Path) -> None:
    source = msgspec.structs.replace(named(), lent=tmp_path)
    launch = Ollama().launch(source, None, Options(), SITE)
    assert launch.mounts == (Mount(kind="bind", source=str(tmp_path), target="/ollama"),)
    assert (launch.network, launch.env["OLLAMA_MODELS"]) == (False, "/ollama")
    with standin(tmp_path) as client, pytest.raises(NotFoundError):
        Ollama().prepare(client, source, Options(), quiet)
    assert 'msg="pull"' not in (tmp_path / "log").read_text()


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
    ("version", "target", "word"), [("0.12.11", "host", "Go heap"), ("0.33.0", "host", "prompt cache"), ("0.33.0", "gpu", None)]
)
def test_what_a_server_of_the_users_takes_beside_is_named(version: str, target: Target, word: str | None) -> None:
    made = made_up()
    machine = msgspec.structs.replace(made.metadata.machine, target=target)
    metadata = msgspec.structs.replace(made.metadata, machine=machine, engine=EngineVersion(version=version))
    said = Ollama.policy.uncounted(msgspec.structs.replace(made, metadata=metadata))
    assert said is None if word is None else word in (said or "")


def test_a_pull_says_how_far_it_is(tmp_path: Path) -> None:
    seen: list[tuple[float, float | None]] = []
    with standin(tmp_path) as client:
        pull(client, "tiny", lambda _, done, total: seen.append((done, total)))
    size = float((registry() / "tiny.gguf").stat().st_size)
    measured = [pair for pair in seen if pair[1] is not None]
    assert measured == sorted(measured)
    assert measured[-1] == (size, size)


@pytest.mark.parametrize("fault", ["cut", "error", "silent-end", "cut,error"])
def test_a_broken_pull_goes_on_where_it_ended(tmp_path: Path, fault: str) -> None:
    """Cut off, an error inside an answer of status 200, an end without success: each is tried again, and not from the start."""
    with standin(tmp_path, STANDIN_PULL=fault) as client:
        pull(client, "tiny", quiet)
    resumed = [int(one) for one in re.findall(r"resumed_at=(\d+)", (tmp_path / "log").read_text())]
    assert len(resumed) == 1 + len(fault.split(","))
    assert resumed[0] == 0
    assert all(resumed[1:])
    (blob,) = (tmp_path / "models" / "blobs").iterdir()
    assert gguf.sha256(blob) == gguf.sha256(registry() / "tiny.gguf")


def test_a_pull_that_was_given_up_is_gone_on_with_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.ollama.models.PULL_ATTEMPTS", 2)
    with standin(tmp_path, STANDIN_PULL="cut,cut") as client, pytest.raises(UnavailableError) as caught:
        pull(client, "tiny", quiet)
    assert caught.value.code == "pull-failed"
    with standin(tmp_path) as client:
        pull(client, "tiny", quiet)
    assert int(re.findall(r"resumed_at=(\d+)", (tmp_path / "log").read_text())[-1]) > 0


def test_a_registry_that_gives_something_else_than_it_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.ollama.models.PULL_ATTEMPTS", 2)
    with standin(tmp_path, STANDIN_PULL="digest,digest") as client, pytest.raises(UnavailableError) as caught:
        pull(client, "tiny", quiet)
    assert caught.value.code == "digest-mismatch"


def test_an_unknown_model_is_not_tried_twice_and_says_what_is_there(served: httpx.Client) -> None:
    asked: list[str] = []
    with pytest.raises(NotFoundError) as caught:
        Ollama().prepare(served, named("nobody/knows:it"), HOST, lambda what, *_: asked.append(what))
    assert "tiny:latest" in str(caught.value.hint)
    assert asked == ["pull nobody/knows:it: pulling manifest"]


def test_what_the_server_says_of_a_model(served: httpx.Client) -> None:
    """Digest of the weights, shape, and tensor bytes that are the file's own."""
    file = registry() / "tiny.gguf"
    found = Ollama().prepare(served, named(f"tiny@{gguf.sha256(file)[:20]}"), HOST, quiet)
    assert found.model == Model(
        name=f"tiny@{gguf.sha256(file)[:20]}", digest=gguf.sha256(file), architecture="llama", quantization="F16",
        train_context=TRAIN_CONTEXT, layers=2,
    )  # fmt: skip
    assert found.tensors == gguf.tensor_bytes(gguf.read_header(file))
    assert found.own_name == "tiny"
    assert not found.embedding


def test_a_model_of_another_digest_is_refused(served: httpx.Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        Ollama().prepare(served, named("tiny@sha256:0123456789ab"), HOST, quiet)
    assert caught.value.code == "digest-differs"


@pytest.mark.parametrize(
    ("name", "kind", "code"), [("elsewhere", NotFoundError, "cloud-model"), ("mlx", BadInputError, "mlx-model")]
)
def test_models_without_memory_of_their_own_here(served: httpx.Client, name: str, kind: type[HarnessError], code: str) -> None:
    with pytest.raises(kind) as caught:
        Ollama().prepare(served, named(name), HOST, quiet)
    assert caught.value.code == code


@pytest.mark.requires("embedded")
@pytest.mark.parametrize("name", ["tiny", "embedder"])
def test_every_request_of_a_load_names_the_same_options(tmp_path: Path, engine_bin: Path, name: str) -> None:
    """One load and two prompts start one runner; the prompt fills what was asked for; unloading leaves none."""
    engine, request = Ollama(), LoadRequest(context=2048, num_batch=512)
    with standin(tmp_path, STANDIN_ENGINE=str(engine_bin)) as client:
        source = engine.prepare(client, named(name), HOST, quiet)
        assert source.embedding is (name == "embedder")
        reported = engine.load(client, source, request, HOST)
        speeds = [engine.generate(client, source, request, HOST, 400, 16) for _ in range(2)]
        engine.unload(client, source, HOST)
        left = client.get("/api/ps").json()["models"]
    assert reported is not None
    assert reported.context == 2048
    assert left == []
    for speed in speeds:
        assert speed.prompt_tokens == pytest.approx(400, rel=0.1), "and nothing of it was in a cache"
        assert bool(speed.decode_tokens_per_s) is (name == "tiny")
    log = (tmp_path / "log").read_text()
    assert log.count('msg="starting llama-server"') == 1
    assert "-c 2048 -np 1" in log
    assert "--load-mode none" in log
    assert "-ub 512" in log


def test_an_answer_that_makes_no_sense(tmp_path: Path) -> None:
    with standin(tmp_path, STANDIN_FAULT="garbage@1") as client:
        source = Ollama().prepare(client, named(), HOST, quiet)
        with pytest.raises(EngineError) as caught:
            Ollama().load(client, source, LoadRequest(context=2048), HOST)
    assert caught.value.code == "bad-answer"


def test_a_silent_engine_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with standin(tmp_path, STANDIN_FAULT="hang@1") as client:
        source = Ollama().prepare(client, named(), HOST, quiet)
        client.timeout = httpx.Timeout(0.3)
        with pytest.raises(BusyError):
            Ollama().load(client, source, LoadRequest(context=2048), HOST)


def test_an_engine_that_hangs_up(tmp_path: Path) -> None:
    with standin(tmp_path, STANDIN_FAULT="crash@1") as client:
        source = Ollama().prepare(client, named(), HOST, quiet)
        with pytest.raises(EngineError) as caught:
            Ollama().load(client, source, LoadRequest(context=2048), HOST)
    assert caught.value.code == "no-answer"
