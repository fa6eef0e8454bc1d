"""``harness estimate``: many models, contexts and cache types, and every quantisation of a repository behind one header."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.engines.ollama.remote import OllamaRegistry
from harness.errors import UnavailableError
from harness.headers import planning
from harness.inventory.machine import LocalMachine
from harness.render.estimates import estimates_text
from harness.serving.calibration_lookup import CalibrationFilter
from harness.serving.estimate_table import estimates
from harness.store.store import Store
from harness.units import GIB, MIB
from tests.support.command import Command
from tests.support.gguf_file import write_gguf
from tests.support.range_server import RangeServer, range_server

SHAPE = {"llama.embedding_length": 512, "llama.attention.head_count": 8, "llama.attention.head_count_kv": 2}


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with range_server() as one:
        yield one


@pytest.fixture
def estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: RangeServer) -> Any:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(planning.Planner, "_run", lambda *_: None)
    monkeypatch.setattr("harness.engines.ollama.get_remote_registry", lambda: OllamaRegistry(server.url))
    run = Command(tmp_path, monkeypatch, capfd)

    def ask(*arguments: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(
            run("estimate", *arguments, "--json", HARNESS_CACHE=str(tmp_path / "cache")).stdout
        )
        return document

    return ask


def model(path: Path, elements: int) -> Path:
    tensors = [("token_embd.weight", elements), ("blk.0.attn_q.weight", elements), ("blk.1.attn_q.weight", elements)]
    return write_gguf(path, train_context=16_384, tensors=tensors, extra=SHAPE)


def test_models_contexts_and_cache_types(estimate: Any, tmp_path: Path, server: RangeServer) -> None:
    first = model(tmp_path / "first.gguf", 200_000)
    server.add_ollama("second:1b", model(tmp_path / "second.gguf", 400_000).read_bytes())
    asked = estimate(str(first), "second:1b", "--ctx", "2048,8192,65536", "--kv-cache-type", "f16,q8_0", "--available", "4GiB")
    assert asked["exit_code"] == 0, asked["errors"]
    rows = asked["data"]["rows"]
    assert [(row["name"], row["kv_cache_type"]) for row in rows] == [
        (name, kind) for name in ("first.gguf", "second:1b") for kind in ("f16", "q8_0")
    ]
    assert {row["source"] for row in rows} == {"formula"}
    assert [cell["context"] for cell in rows[0]["contexts"]] == [2048, 8192], "beyond training there is nothing to say"
    f16, q8 = ([cell["required_bytes"] for cell in row["contexts"]] for row in rows[:2])
    assert f16[0] < f16[1]
    assert q8[1] < f16[1]
    assert (rows[0]["largest_context"], asked["data"]["target"]) == (16_384, "gpu")


@pytest.mark.parametrize(("cache", "tight"), [(None, True), ("100", False)])
def test_what_a_server_may_take_of_host_memory_later_is_said(
    estimate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str | None, tight: bool
) -> None:
    """Of 4 GiB: 8 GiB of prompts where nothing limits them."""
    for name, found in (("nvidia", UnavailableError("no GPU")), ("host_bytes", 4 * GIB)):
        monkeypatch.setattr(LocalMachine, name, found)
    monkeypatch.setattr(LocalMachine, "engine_gpus", lambda *_: UnavailableError("no GPU"))
    monkeypatch.setattr(LocalMachine, "running", lambda *_: ())
    monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", "0")
    if cache is not None:
        monkeypatch.setenv("LLAMA_ARG_CACHE_RAM", cache)
    first = str(model(tmp_path / "first.gguf", 200_000))
    (cell,) = estimate(first, "--ctx", "2048")["data"]["rows"][0]["contexts"]
    assert (cell["verdict"], cell["tight"]) == ("fits", tight)
    assert cell["host_growth_bytes"] == (8192 if cache is None else 100) * MIB
    text = " ".join(
        "".join(
            map(
                str,
                estimates_text(
                    estimates([first], Store(tmp_path), LocalMachine(), contexts=(2048,), wanted=CalibrationFilter())
                ),
            )
        ).split()
    )
    assert ("* tight: later its server may take up to 8,192.0 MiB more of host memory" in text) is tight


def test_a_model_that_cannot_be_read_does_not_hide_the_others(estimate: Any, tmp_path: Path) -> None:
    first = str(model(tmp_path / "first.gguf", 200_000))
    rows = estimate(first, str(tmp_path / "none.gguf"), "--available", "4GiB")["data"]["rows"]
    assert [row["error"] is None for row in rows] == [True, False]
    alone = estimate(str(tmp_path / "none.gguf"), "--available", "4GiB")
    assert alone["exit_code"] == 66


def test_every_quantisation_of_a_repository_behind_one_header(
    estimate: Any, tmp_path: Path, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    sizes = {"tiny-Q4_K_M.gguf": 1_000_000, "tiny-Q8_0.gguf": 2_000_000, "tiny-F16.gguf": 4_000_000}
    server.add_repository("me/tiny-GGUF", {name: model(tmp_path / name, size).read_bytes() for name, size in sizes.items()})
    asked = estimate("hf.co/me/tiny-GGUF", "--ctx", "8192", "--available", "4GiB")
    assert asked["exit_code"] == 0, asked["errors"]
    rows = asked["data"]["rows"]
    assert [row["quantization"] for row in rows] == ["Q4_K_M", "Q8_0", "F16"]
    needed = [row["contexts"][0]["required_bytes"] for row in rows]
    assert needed[1] - needed[0] == pytest.approx(12_000_000, abs=100_000)
    assert needed[2] - needed[1] == pytest.approx(24_000_000, abs=100_000)
    read = {path for path, *_ in server.requests if path.endswith(".gguf")}
    assert len(read) == 1
    (one,) = estimate("hf.co/me/tiny-GGUF:Q8_0", "--ctx", "8192", "--available", "4GiB")["data"]["rows"]
    assert one["contexts"][0]["required_bytes"] == pytest.approx(needed[1], abs=1_000_000)
