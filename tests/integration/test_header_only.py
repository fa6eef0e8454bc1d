"""A model that is measured from its header alone: the same figures, and never mistaken for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.units import MIB, from_gib
from tests.support.models import write_tiny_llama
from tests.support.range_server import RangeServer, range_server

pytestmark = pytest.mark.requires("embedded")
QUICK = ("--engine", "llama-server", "--gpus", "none", "--ctx", "1024,2048,4096")


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with range_server() as one:
        yield one


def harness(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    at = () if arguments[0] == "diff" else ("--store", str(folder / "store"))
    done = subprocess.run(
        [sys.executable, "-m", "harness", *arguments, *at, "--json"],
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "HARNESS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["exit_code"] == done.returncode
    return done.returncode, answer


def test_a_header_measures_what_the_weights_do(tmp_path: Path, server: RangeServer) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    server.files["/tiny.gguf"] = model.read_bytes()

    status, first = harness(tmp_path, "calibrate", f"{server.url}/tiny.gguf", "--header-only", *QUICK)
    assert status == 0, first["errors"]
    header = first["data"]["calibration"]
    metadata = header["metadata"]
    assert (header["id"], metadata["weights"], metadata["model"]["digest"]) == ("llama-server/tiny", "header", None)
    assert metadata["source"] == {"address": f"{server.url}/tiny.gguf", "revision": None}
    assert set(metadata["performance"].values()) == {None}
    assert any("only the header" in note for note in metadata["quality"]["notes"])
    assert server.sent < model.stat().st_size

    kept = tmp_path / "header.yaml"
    Path(first["data"]["artifact"]).rename(kept)
    status, second = harness(tmp_path, "calibrate", str(model), "--no-speed", *QUICK)
    assert status == 0, second["errors"]
    full = second["data"]["calibration"]
    assert full["metadata"]["weights"] == "full"
    bases = [from_gib(one["constants"]["base_vram_gb"]) for one in (header, full)]
    assert abs(bases[0] - bases[1]) < MIB
    assert header["constants"]["kv_cache_gb_per_10k"] == full["constants"]["kv_cache_gb_per_10k"]
    growths = [from_gib(one["constants"]["compute_gb_per_10k"]) * 4096 / 10_000 for one in (header, full)]
    assert abs(growths[0] - growths[1]) < MIB / 8, "of 4 MiB; a few pages of a heap come and go between two runs"
    status, moved = harness(tmp_path, "diff", str(kept), second["data"]["artifact"])
    assert (status, moved["exit_code"]) == (0, 0)


def test_the_weights_replace_a_header_and_not_the_other_way_round(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "tiny.gguf"))
    status, answer = harness(tmp_path, "calibrate", model, "--header-only", *QUICK)
    assert status == 0, answer["errors"]
    assert answer["data"]["calibration"]["metadata"]["model"]["digest"] is not None
    hole = next((tmp_path / "cache").rglob("*.gguf"))
    assert harness(tmp_path, "serve", str(hole), "--ctx", "1024")[0] == 66
    assert harness(tmp_path, "calibrate", str(hole), *QUICK)[0] == 66

    status, answer = harness(tmp_path, "calibrate", model, "--no-speed", *QUICK)
    assert status == 0, answer["errors"]
    status, answer = harness(tmp_path, "calibrate", model, "--header-only", *QUICK)
    assert status == 73
    assert "of the weights themselves" in answer["errors"][0]["message"]
    status, listed = harness(tmp_path, "clean", "--yes")
    assert [one["removed"] for one in listed["data"]["items"] if one["kind"] == "header"] == [True]


def test_a_sweep_and_a_recalibration_by_header(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"defaults: {{engine: llama-server, sandbox: process, gpus: none, header_only: true, ctx: '1024,2048,4096'}}\n"
        f"matrix: {{model: ['{model}']}}\n"
    )
    status, answer = harness(tmp_path, "sweep", str(plan))
    assert status == 0, answer["errors"]
    status, answer = harness(tmp_path, "show", "tiny")
    assert answer["data"]["calibration"]["metadata"]["weights"] == "header"
    status, answer = harness(tmp_path, "recalibrate", "tiny", "--models", str(tmp_path))
    assert status == 0, answer["errors"]
    status, answer = harness(tmp_path, "show", "tiny")
    assert answer["data"]["calibration"]["metadata"]["weights"] == "header"

    plan.write_text("include: [{model: 'https://example.org/x.gguf', header_only: true}]\n")
    status, answer = harness(tmp_path, "sweep", str(plan))
    assert status == 77, "a plan may not say where a header is fetched, unless that is allowed"


def test_one_load_and_the_plan_of_the_others_give_the_same_figures(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "tiny.gguf"))
    status, answer = harness(tmp_path, "calibrate", model, "--quick", *QUICK)
    assert status == 0, answer["errors"]
    quick = answer["data"]["calibration"]
    quality = quick["metadata"]["quality"]
    assert [load.get("planned", False) for load in quality["loads"]] == [False, True, True]
    assert quality["plan_error"] < 0.001
    assert quality["max_error"] >= quality["plan_error"]
    record = json.loads(Path(answer["data"]["record"]).read_text())
    assert [load["request"].get("purpose", "point") for load in record["loads"]] == ["point", "planned", "planned"]

    status, answer = harness(tmp_path, "calibrate", model, "--variant", "slow", "--no-speed", *QUICK)
    assert status == 0, answer["errors"]
    for name, value in answer["data"]["calibration"]["constants"].items():
        assert quick["constants"][name] == pytest.approx(value, abs=1e-3 if name == "base_vram_gb" else 1.5e-6)

    status, answer = harness(tmp_path, "calibrate", model, "--quick", "--env", "LLAMA_ARG_SWA_FULL=1", *QUICK)
    assert (status, answer["errors"][0]["code"]) == (2, "no-quick")
