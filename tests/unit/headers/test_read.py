"""Headers from every kind of source, and the sparse files that stand for their models."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from harness.engines import gguf
from harness.engines.base import Options
from harness.engines.ollama.remote import OllamaRegistry
from harness.engines.registry import recipe_of
from harness.errors import BadInputError, CannotWriteError, HarnessError, NotFoundError, NotPermittedError, UsageError
from harness.headers import holes, sources
from harness.headers.holes import headers_folder
from harness.headers.read import header_only
from harness.headers.sources import find, is_remote, variants
from harness.maintain.clean import clean
from tests.support.gguf_file import write_gguf
from tests.support.range_server import RangeServer, digest_of, range_server

WEIGHTS = (("token_embd.weight", 200_000), ("blk.0.attn_q.weight", 300_000), ("blk.1.attn_q.weight", 400_000))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model-Q4_K_M.gguf", tensors=WEIGHTS)


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with range_server() as one:
        yield one


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=5.0) as one:
        yield one


def same_but_for_weights(hole: Path, model: Path) -> bool:
    begin = gguf.read_header(model).begin
    whole, here = model.read_bytes(), hole.read_bytes()
    return here[:begin] == whole[:begin] and here[begin:] == bytes(len(whole) - begin)


def test_a_file_of_this_machine(model: Path, client: httpx.Client) -> None:
    with header_only(find(str(model), client), client) as found:
        (hole,) = found.parts
        assert same_but_for_weights(hole, model)
        assert hole.stat().st_blocks * 512 < model.stat().st_size / 10
        assert gguf.is_header_only(hole)
        assert found.tensors == gguf.tensor_bytes(gguf.read_header(model))
        assert found.digest is None  # whoever measures it hashes the file itself


def test_an_address(model: Path, server: RangeServer, client: httpx.Client) -> None:
    server.files["/m/model-Q4_K_M.gguf"] = model.read_bytes()
    name = f"{server.url}/m/model-Q4_K_M.gguf"
    assert is_remote(name)
    with header_only(find(name, client), client) as found:
        assert found.name == "model-Q4_K_M.gguf"
        assert same_but_for_weights(found.parts[0], model)
        assert found.digest is None
    assert server.sent < 200_000 < model.stat().st_size


def test_a_try_that_failed_is_gone_on_with(tmp_path: Path, server: RangeServer, client: httpx.Client) -> None:
    model = write_gguf(tmp_path / "long.gguf", tensors=WEIGHTS, extra={"long": "x" * 300_000})
    server.files["/long.gguf"] = model.read_bytes()
    server.faults["/long.gguf"] = ["", "", "404"]
    with pytest.raises(NotFoundError), header_only(find(f"{server.url}/long.gguf", client), client):
        pass
    server.requests.clear()
    with header_only(find(f"{server.url}/long.gguf", client), client) as found:
        assert same_but_for_weights(found.parts[0], model)
    assert server.requests[0][1] == "bytes=131072-262143"


def test_a_split_model(tmp_path: Path, server: RangeServer, client: httpx.Client) -> None:
    for number in (1, 2):
        extra = {"split.count": 2, "split.no": number - 1}
        path = write_gguf(
            tmp_path / f"big-{number:05d}-of-00002.gguf", tensors=[(f"blk.{number}.attn_q.weight", 90_000)], extra=extra
        )
        server.files[f"/{path.name}"] = path.read_bytes()
    for name in (f"{server.url}/big-00001-of-00002.gguf", str(tmp_path / "big-00001-of-00002.gguf")):
        with header_only(find(name, client), client) as found:
            assert [one.name for one in found.parts] == [f"big.header-only-{n:05d}-of-00002.gguf" for n in (1, 2)]
            assert len(found.tensors.layer_bytes) == 2
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    with pytest.raises(NotFoundError, match="00002-of-00002"):
        find(str(tmp_path / "big-00001-of-00002.gguf"), client)
    whole = write_gguf(tmp_path / "renamed.gguf", tensors=WEIGHTS, extra={"split.count": 2})
    with pytest.raises(BadInputError, match="one of 2 parts"), header_only(find(str(whole), client), client):
        pass


def test_ollamas_registry(model: Path, server: RangeServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.ollama.get_remote_registry", lambda: OllamaRegistry(server.url))
    projector = write_gguf(model.with_name("projector.gguf"), tensors=[("v.blk.0.ln1.weight", 50_000)]).read_bytes()
    digest = server.add_ollama("tiny:1b", model.read_bytes(), projector)
    with header_only(find("tiny:1b", client, "ollama"), client) as found:
        assert (found.name, found.digest) == ("tiny:1b", digest)
        assert same_but_for_weights(found.parts[0], model)
        source, options = recipe_of("ollama").from_header(found, Options(engine="ollama"))
        assert (source.own_name, source.weights, source.model.digest) == ("tiny:1b", "header", digest)
        store = Path(options.models or "")
        assert json.loads((store / "manifests/registry.ollama.ai/library/tiny/1b").read_text())["layers"][0]["digest"] == digest
        assert same_but_for_weights(store / "blobs" / digest.replace(":", "-"), model)
        blob = (store / "blobs" / digest_of(projector).replace(":", "-")).read_bytes()
        assert len(blob) == len(projector)
        sent = server.sent
    with header_only(find("tiny:1b", client), client):
        assert server.sent - sent < 2000, "what its digest names is here already"
    with pytest.raises(NotFoundError, match="no model 'other'"):
        find("other", client)


def test_a_registry_that_sends_another_document(
    server: RangeServer, client: httpx.Client, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engines.ollama.get_remote_registry", lambda: OllamaRegistry(server.url))
    server.add_ollama("tiny:1b", model.read_bytes())
    for path, data in server.files.items():
        if data.startswith(b'{"stop"'):
            server.files[path] = b'{"evil": 1}'
    with pytest.raises(BadInputError, match="is not sha256:"), header_only(find("tiny:1b", client), client):
        pass


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"config": 1, "layers": []}',
        b'{"config": {"digest": "../x", "size": 1, "mediaType": "m"}, "layers": []}',
    ],
)
def test_a_manifest_that_is_none(text: bytes) -> None:
    with pytest.raises(BadInputError):
        OllamaRegistry().layers("tiny", text)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("qwen2.5:0.5b", "https://registry.ollama.ai/v2/library/qwen2.5/manifests/0.5b"),
        ("llama3", "https://registry.ollama.ai/v2/library/llama3/manifests/latest"),
        ("me/mine:x", "https://registry.ollama.ai/v2/me/mine/manifests/x"),
        ("hf.co/o/r:Q4_K_M", "https://hf.co/v2/o/r/manifests/Q4_K_M"),
    ],
)
def test_where_a_manifest_is(name: str, url: str) -> None:
    assert OllamaRegistry().manifest(name).url == url


@pytest.fixture
def hub(server: RangeServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    data = model.read_bytes()
    server.add_repository(
        "me/tiny-GGUF",
        {"tiny-Q4_K_M.gguf": data, "tiny-Q8_0.gguf": data + bytes(64), "mmproj-f16.gguf": data, "README.md": b"x"},
    )
    return server


def test_a_repository(hub: RangeServer, client: httpx.Client, model: Path) -> None:
    found = find("hf.co/me/tiny-GGUF", client)
    assert (found.name, found.quantization, found.revision) == ("tiny-Q4_K_M.gguf", "Q4_K_M", "c" * 40)
    assert found.digest == digest_of(model.read_bytes())
    assert found.projector is not None
    assert [one.quantization for one in variants("hf.co/me/tiny-GGUF")] == ["Q4_K_M", "Q8_0"]
    assert find("hf://me/tiny-GGUF/tiny-Q8_0.gguf", client).name == "tiny-Q8_0.gguf"
    assert find("hf.co/me/tiny-GGUF:q8_0", client).quantization == "Q8_0"
    with header_only(found, client) as here:
        assert same_but_for_weights(here.parts[0], model)
        assert here.revision == "c" * 40
    with pytest.raises(NotFoundError, match="has no Q2_K") as caught:
        find("hf.co/me/tiny-GGUF:Q2_K", client)
    assert "Q4_K_M, Q8_0" in (caught.value.hint or "")


def test_a_gated_repository(hub: RangeServer, client: httpx.Client) -> None:
    said = {"x-error-code": "GatedRepo", "x-error-message": "Access to model me/gated is restricted."}
    hub.documents["/api/models/me/gated"] = (403, b"{}", said)
    with pytest.raises(NotPermittedError, match="gated") as caught:
        find("hf.co/me/gated", client)
    assert "huggingface.co/me/gated" in (caught.value.hint or "")


def test_without_the_hubs_client(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HarnessError, match="its own client") as caught:
        find("hf.co/me/tiny-GGUF", client)
    assert "[hub]" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["hf://me/only", "hf.co/me", "hf.co/../x/y", "https://example.org/model.bin"])
def test_an_address_that_cannot_be(name: str, client: httpx.Client) -> None:
    with pytest.raises(UsageError):
        find(name, client)


def test_a_header_without_an_end(server: RangeServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.headers.read.LARGEST", 1 << 20)
    fields = b"".join(
        struct.pack("<Q", 8) + f"{n:08d}".encode() + struct.pack("<IQ", 8, 60_000) + b"x" * 60_000 for n in range(60)
    )
    server.files["/endless.gguf"] = b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 13) + fields
    found = find(f"{server.url}/endless.gguf", client)
    with pytest.raises(BadInputError, match="no end"), header_only(found, client):
        pass
    assert server.sent < 3 << 20


def test_a_size_that_the_index_does_not_say(hub: RangeServer, client: httpx.Client) -> None:
    found = find("hf.co/me/tiny-GGUF", client)
    hub.files[f"/me/tiny-GGUF/resolve/{'c' * 40}/tiny-Q4_K_M.gguf"] += b"more"
    with pytest.raises(BadInputError, match="its index says"), header_only(found, client):
        pass


def test_a_disk_without_holes(model: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holes, "_taken", lambda _: 1 << 30)
    with pytest.raises(CannotWriteError, match="does not support sparse files"), header_only(find(str(model), client), client):
        pass
    assert not list(headers_folder().rglob("*.gguf"))


def test_it_is_never_served(tmp_path: Path) -> None:
    for engine in ("llama-server", "ollama"):
        with pytest.raises(NotFoundError, match="without weights"):
            recipe_of(engine).resolve(str(tmp_path / "x.header-only.gguf"), Options(engine=engine))


def test_clean_lists_it_and_removes_what_is_not_in_use(model: Path, client: httpx.Client, tmp_path: Path) -> None:
    with header_only(find(str(model), client), client) as found:
        (item,) = (one for one in clean(tmp_path / "store", remove_abandoned=True).items if one.kind == "header")
        assert (item.state, item.removed) == ("in-use", False)
    (item,) = (one for one in clean(tmp_path / "store", remove_abandoned=True).items if one.kind == "header")
    assert item.removed
    assert not found.folder.exists()


def test_what_is_not_ours_in_the_cache_stays(tmp_path: Path, cache: Path) -> None:
    (cache / "headers" / "mine").mkdir(parents=True)
    clean(tmp_path / "store", remove_abandoned=True)
    assert (cache / "headers" / "mine").is_dir()


def test_an_engine_is_asked_for_its_registry_by_name(monkeypatch: pytest.MonkeyPatch, client: httpx.Client) -> None:
    monkeypatch.setattr(sources, "engine_names", lambda: ("vllm", "llama-server"))
    with pytest.raises(NotFoundError, match="neither a file nor an address"):
        find("tiny", client)
