"""Ollama as it is installed on a machine: which models it has, who may read them, and how one of them is lent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.engines.base import Options
from harness.engines.ollama import native
from harness.engines.ollama.policy import is_on
from harness.engines.ollama.recipe import Ollama
from harness.engines.ollama.servers import processes
from harness.engines.registry import policy_of
from harness.engines.running import RunningServer
from harness.errors import BadInputError, HarnessError, NotFoundError, NotPermittedError, UnavailableError
from harness.prediction.settings import AskedSettings
from harness.sandboxes.base import PRIVATE, GpuRequest, Site
from tests.support.ollama import registry
from tests.support.ollama_installed import own_ollama, store

PROCESS = Site(sandbox="process", host="127.0.0.1", port=8080)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with an Ollama of their own, and no other on the machine."""
    return own_ollama(tmp_path, monkeypatch)


def found(name: str = "tiny", **options: str) -> Path:
    return native.find_store(name, Options(sandbox="process", **options), os.environ)  # type: ignore[arg-type]


def test_models_are_where_they_are_named_else_the_user_s_else_the_service_s(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = store(home / "service")
    assert found() == service
    own = store(home / "home" / ".ollama" / "models")
    assert found() == own
    (home / "units" / "ollama.service.d").mkdir(parents=True)
    unit = f'[Service]\nEnvironment="OLLAMA_HOST=0.0.0.0"\nEnvironment="OLLAMA_MODELS={home}/disk"\n'
    (home / "units" / "ollama.service.d" / "override.conf").write_text(unit)
    assert found() == own, "what the service names has no such model"
    disk = store(home / "disk")
    assert found() == disk
    server = RunningServer(pid=1, port=11434, settings={"OLLAMA_MODELS": str(store(home / "of-the-server"))})
    monkeypatch.setattr(native, "processes", lambda _: (server,))
    assert found() == home / "of-the-server"
    monkeypatch.setenv("OLLAMA_MODELS", str(store(home / "of-the-shell")))
    assert found() == home / "of-the-shell"
    assert found(models=str(store(home / "lent"))) == home / "lent"


def test_a_model_that_is_nowhere_is_told_with_those_that_are(home: Path) -> None:
    store(home / "service", "qwen2.5", "7b")
    with pytest.raises(NotFoundError) as caught:
        found("llama3:8b")
    assert "qwen2.5:7b" in str(caught.value.hint)
    assert "ollama pull llama3:8b" in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="Docker volume"):
        found(models="ollama")


def test_models_of_the_service_alone_are_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the refusal is played: of the folder, and of a blob alone."""
    folder = store(home / "service")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(NotPermittedError) as caught:
        found()
    assert (caught.value.exit_code, str(folder) in caught.value.message) == (77, True)
    assert "--models DIR" in str(caught.value.hint)

    def closed(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", closed)
    with pytest.raises(NotPermittedError, match="account"):
        found()


def test_a_lent_model_is_a_copy_of_its_manifest_and_links(home: Path) -> None:
    folder = store(home / "service")
    store(folder, "another")
    linked = native.linked(folder, "tiny")
    path = "manifests/registry.ollama.ai/library/tiny/latest"
    assert linked.files == {f"models/{path}": (folder / path).read_bytes()}, "byte for byte: its digest is the model's"
    assert {Path(name).name for name in linked.links} == {one.name for one in (folder / "blobs").iterdir()}
    assert all(Path(target).is_file() for target in linked.links.values())


@pytest.mark.parametrize("text", ["", "[1]", '{"layers": [1]}', '{"layers": [{"digest": "sha256-../../x"}]}', '{"layers": 3}'])
def test_a_damaged_manifest_is_not_followed(home: Path, text: str) -> None:
    folder = store(home / "service")
    (folder / "manifests/registry.ollama.ai/library/tiny/latest").write_text(text)
    with pytest.raises(BadInputError):
        native.linked(folder, "tiny")


def test_a_file_is_lent_by_a_link_and_not_copied() -> None:
    path = registry() / "tiny.gguf"
    digest = f"sha256:{'ab' * 32}"
    linked = native.linked_file(path, digest, "llama")
    assert linked.links == {f"models/blobs/sha256-{'ab' * 32}": str(path)}
    (manifest,) = (data for name, data in linked.files.items() if "manifests" in name)
    body = json.loads(manifest)
    assert [(layer["digest"], layer["size"]) for layer in body["layers"]] == [(digest, path.stat().st_size)]
    assert f"models/blobs/{body['config']['digest'].replace(':', '-')}" in linked.files


def test_a_private_server_has_a_folder_and_a_port_of_its_own(home: Path) -> None:
    store(home / "service")
    options = Options(sandbox="process", target="host", gpus=GpuRequest(mode="none"), env={"OLLAMA_MODELS": "/mine"}, timeout=9)
    launch = Ollama().launch(Ollama().resolve("tiny", options), None, options, PROCESS)
    assert launch.argv == (str(home / "bin" / "ollama"), "serve")
    assert (launch.env["HOME"], launch.env["OLLAMA_MODELS"]) == (PRIVATE, f"{PRIVATE}/models"), "whatever --env says"
    assert launch.env["OLLAMA_HOST"] == "127.0.0.1:8080"
    assert (launch.env["OLLAMA_NO_CLOUD"], launch.env["OLLAMA_NOPRUNE"], launch.env["OLLAMA_NUM_PARALLEL"]) == ("1", "1", "1")
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "-1"
    assert not launch.network, "nothing is pulled: the user's store is the user's"
    options = Options(sandbox="process", gpus=GpuRequest(mode="ids", ids=("GPU-1", "0")))
    assert Ollama().launch(Ollama().resolve("tiny", options), None, options, PROCESS).env["CUDA_VISIBLE_DEVICES"] == "GPU-1,0"
    options = Options(sandbox="process", gpus=GpuRequest(mode="ids", ids=("Vulkan0",)))
    with pytest.raises(UnavailableError):
        Ollama().launch(Ollama().resolve("tiny", options), None, options, PROCESS)


def test_the_program_is_the_user_s_own(home: Path) -> None:
    (home / "lib" / "ollama").mkdir(parents=True)
    (home / "lib" / "ollama" / "llama-server").touch()
    assert Ollama().installed(Options()) == (home / "bin" / "ollama", home / "lib" / "ollama" / "llama-server")
    for binary, error in (("/no/such", NotFoundError), (str(home / "lib" / "ollama" / "llama-server"), HarnessError)):
        with pytest.raises(error):
            Ollama().installed(Options(engine_binary=binary))


def test_without_a_program_it_says_what_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert Ollama().installed(Options()) == ()
    with pytest.raises(UnavailableError, match="no ollama"):
        Ollama().launch(Ollama().resolve(str(registry() / "tiny.gguf"), Options()), None, Options(), PROCESS)


@pytest.mark.parametrize(
    ("integrated", "gfx", "env", "used"),
    [
        (False, None, {}, True),
        (True, 110501, {}, True),
        (True, 110003, {}, False),
        (True, None, {"OLLAMA_IGPU_ENABLE": "1"}, True),
        (True, None, {"OLLAMA_IGPU_ENABLE": "True"}, True),
        (True, None, {"OLLAMA_IGPU_ENABLE": "F"}, False),
    ],
)
def test_integrated_gpus_are_used_as_ollama_uses_them(
    integrated: bool, gfx: int | None, env: dict[str, str], used: bool
) -> None:
    assert Ollama().leaves_alone(integrated, gfx, env) is not used


def test_servers_of_the_machine_and_what_they_are_set_to(tmp_path: Path) -> None:
    """Two Ollamas, one of an account that does not show its environment, and one that harness started."""

    def process(pid: int, *words: str, **env: str) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes("\0".join((*words, "")).encode())
        if env:
            (folder / "environ").write_bytes("\0".join(f"{key}={value}" for key, value in env.items()).encode())

    process(10, "/usr/bin/ollama", "serve", HOME="/root", OLLAMA_KV_CACHE_TYPE="q8_0", OLLAMA_HOST=":11500", SECRET="x")
    process(11, "/usr/local/bin/ollama", "serve")
    process(
        12,
        "/usr/bin/ollama",
        "serve",
        OLLAMA_MODELS="/var/tmp/harness-private-0123456789abcdef/models",
        OLLAMA_HOST="127.0.0.1:9",
    )
    process(13, "/usr/bin/ollama", "run", "x")
    process(14, "python3", "serve")
    assert [(one.pid, one.port, one.settings, one.readable) for one in processes(tmp_path)] == [
        (10, 11500, {"OLLAMA_KV_CACHE_TYPE": "q8_0"}, True),
        (11, 11434, {}, False),
    ]


def test_the_settings_of_a_server_are_read_from_its_variables() -> None:
    said = policy_of("ollama").settings_by({"OLLAMA_KV_CACHE_TYPE": "q8_0", "OLLAMA_FLASH_ATTENTION": "false"})
    assert (said.kv_cache_type, said.flash_attention) == ("q8_0", "disabled")
    assert policy_of("ollama").settings_by({"OLLAMA_FLASH_ATTENTION": ""}) == AskedSettings()


@pytest.mark.parametrize("value", ["1", "true", "T", "yes", '"1"'])
def test_a_switch_is_on_unless_go_reads_it_as_false(value: str) -> None:
    assert is_on({"OLLAMA_SCHED_SPREAD": value}, "OLLAMA_SCHED_SPREAD")


@pytest.mark.parametrize("value", ["0", "f", "FALSE", ""])
def test_a_switch_that_go_reads_as_false_is_off(value: str) -> None:
    assert not is_on({"OLLAMA_SCHED_SPREAD": value}, "OLLAMA_SCHED_SPREAD")
