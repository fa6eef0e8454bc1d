"""Requests to an Ollama: pulls that break, answers that make no sense, and what it says of a model."""

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
from harness.engines.ollama.names import over_plain_http
from harness.engines.ollama.recipe import Ollama
from harness.errors import BadInputError, BusyError, EngineError, HarnessError, NotFoundError, UnavailableError
from harness.model.record import LoadRequest, Model
from harness.sandboxes.base import GpuRequest, Mount, Site
from tests.support.ollama import TRAIN_CONTEXT, registry, standin

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
