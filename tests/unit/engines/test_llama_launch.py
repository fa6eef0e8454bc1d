"""Command lines of llama-server that no measurement can do without."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from harness.engines.base import Options, Source
from harness.engines.llama_server.recipe import LlamaServer, build_of
from harness.model.record import LoadRequest, Model
from harness.sandboxes.base import GpuRequest, Site
from harness.units import MIB


def arguments(request: LoadRequest, tmp_path: Path, **options: object) -> list[str]:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    source = Source(model=Model(name="m"), path=model)
    asked = Options(engine_binary=str(binary), gpus=GpuRequest.parse("Vulkan0"), **options)  # type: ignore[arg-type]
    return list(LlamaServer().launch(source, request, asked, Site(sandbox="process", host="127.0.0.1", port=1)).argv)


def pairs(argv: list[str]) -> set[tuple[str, str]]:
    return set(pairwise(argv))


def test_a_dry_run_fits_a_number_of_layers_and_names_their_kinds(tmp_path: Path) -> None:
    argv = arguments(LoadRequest(context=4096, purpose="dry-run", gpu_layers=7, experts_on_host=True), tmp_path)
    assert {("-ngl", "7"), ("-fit", "on"), ("--log-verbosity", "5"), ("-dev", "Vulkan0")} <= pairs(argv)
    assert "--cpu-moe" in argv


def test_a_dry_run_is_made_by_the_server_also_where_the_build_has_a_tool_that_prints_and_ends(tmp_path: Path) -> None:
    """The tool reserves logits for a whole batch: 94.5 MiB of compute where the server takes 40.0 (b11434, qwen3moe)."""
    binary = str(tmp_path / "llama-server")
    tool = tmp_path / "llama-fit-params"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    argv = arguments(LoadRequest(context=4096, purpose="dry-run", gpu_layers=7), tmp_path)
    assert argv[0] == binary
    assert {("-ngl", "7"), ("-fit", "on"), ("-np", "1")} <= pairs(argv)


def test_a_dry_run_with_remote_devices_ends_between_two_calls(tmp_path: Path) -> None:
    """A server that is ended in the middle of a call takes a user's ggml-rpc-server with it."""
    local = Options(gpus=GpuRequest.parse("Vulkan0"))
    far = Options(gpus=GpuRequest.parse("RPC0"), env={"LLAMA_ARG_RPC": "127.0.0.1:50052"})
    assert [LlamaServer().ends_dry_runs(one) for one in (local, far)] == ["printed", "ready"]


def test_a_split_over_devices_is_asked_for_as_the_engines_own_fit_writes_it(tmp_path: Path) -> None:
    """Layers of each device, the output last; experts of the last ones of each stay on the host."""
    asked = LoadRequest(context=4096, purpose="dry-run", gpu_layers=6, split=(3, 3), without_experts=(1, 2))
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o755)
    source = Source(model=Model(name="m", layers=8), path=model)
    options = Options(engine_binary=str(tmp_path / "llama-server"))
    argv = list(LlamaServer().launch(source, asked, options, Site(sandbox="process", host="127.0.0.1", port=1)).argv)
    assert {("-ngl", "6"), ("-ts", "3,3"), ("-ot", r"blk\.(5|6|7)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU")} <= pairs(argv)


@pytest.mark.parametrize(("asked", "keys", "values"), [("q8_0", "q8_0", "q8_0"), ("q8_0/f16", "q8_0", "f16")])
def test_keys_and_values_have_types_of_their_own(tmp_path: Path, asked: str, keys: str, values: str) -> None:
    argv = arguments(LoadRequest(context=2048), tmp_path, kv_cache_type=asked)
    assert {("-ctk", keys), ("-ctv", values)} <= pairs(argv)


def test_speed_with_nothing_on_the_gpu_still_has_the_gpu(tmp_path: Path) -> None:
    argv = arguments(LoadRequest(context=2048, purpose="host-speed"), tmp_path)
    assert {("-ngl", "0"), ("-fit", "off"), ("-dev", "Vulkan0")} <= pairs(argv)
    on_host = arguments(LoadRequest(context=2048, purpose="speed"), tmp_path, target="host")
    assert {("-ngl", "0"), ("-dev", "none")} <= pairs(on_host)


@pytest.mark.parametrize(
    ("said", "build"),
    [
        ("version: 10434 (1a2b3c4)\nbuilt with GNU 11.4.0", "10434"),
        ("ggml_cuda_init: found 1 CUDA devices\nversion: 0.6.0-dev (build 11434, commit 7e4c0a9)", "b11434"),
        ("version: b1 (stand-in)\n", "b1"),
        ("llama-server: command not understood", None),
    ],
)
def test_the_build_is_read_from_either_form_of_the_version(said: str, build: str | None) -> None:
    assert build_of(said) == build


def test_libraries_beside_the_engine_come_before_those_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver's library may be found by LD_LIBRARY_PATH alone."""
    (tmp_path / "libggml-base.so.0").touch()
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    options = Options(engine_binary=str(binary))
    source = Source(model=Model(name="m"), path=tmp_path / "m.gguf")
    site = Site(sandbox="process", host="127.0.0.1", port=1)
    for named, expected in ((None, f"{tmp_path}"), ("/usr/local/nvidia/lib64", f"{tmp_path}:/usr/local/nvidia/lib64")):
        monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        if named is not None:
            monkeypatch.setenv("LD_LIBRARY_PATH", named)
        launch = LlamaServer().launch(source, LoadRequest(context=1024), options, site)
        assert launch.env["LD_LIBRARY_PATH"] == expected


@pytest.mark.parametrize(
    ("env", "reserve"),
    [
        ({}, 1024),
        ({"LLAMA_ARG_FIT_TARGET": "512"}, 512),
        ({"LLAMA_ARG_FIT_TARGET": "512,2048"}, 512),
        ({"LLAMA_ARG_FIT_TARGET": "²"}, 1024),
        ({"LLAMA_ARG_FIT": "off"}, 0),
        ({"LLAMA_ARG_FIT": "0", "LLAMA_ARG_FIT_TARGET": "512"}, 0),
        ({"LLAMA_ARG_FIT": "on"}, 1024),
    ],
)
def test_what_its_fit_keeps_free(env: dict[str, str], reserve: int) -> None:
    assert LlamaServer.policy.reserve_bytes("b11434", env) == reserve * MIB
