"""Command lines of llama-server that no measurement can do without."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from harness.engines.base import Options, Source
from harness.engines.llama_server.recipe import LlamaServer
from harness.model.record import LoadRequest, Model
from harness.sandboxes.base import GpuRequest, Site


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


def test_speed_with_nothing_on_the_gpu_still_has_the_gpu(tmp_path: Path) -> None:
    argv = arguments(LoadRequest(context=2048, purpose="host-speed"), tmp_path)
    assert {("-ngl", "0"), ("-fit", "off"), ("-dev", "Vulkan0")} <= pairs(argv)
    on_host = arguments(LoadRequest(context=2048, purpose="speed"), tmp_path, target="host")
    assert {("-ngl", "0"), ("-dev", "none")} <= pairs(on_host)
