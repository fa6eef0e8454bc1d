"""Death at each stage of a load, and devices that are not GPUs: a real engine, a model of a few megabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.units import GIB
from tests.support.background import engines_of
from tests.support.models import KV_PER_TOKEN, write_tiny_llama
from tests.support.rpc import programs
from tests.support.waiting import until

pytestmark = pytest.mark.requires("embedded")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def calibrating(tiny: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def begin(stop_at: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.calibrating", str(tiny), str(tmp_path / "store"), stop_at],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{stop_at}\n", process.communicate(timeout=200)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=200)


def record_of(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "store" / "runs").glob("*/record.json")
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize(("stage", "loads"), [("start", 1), ("started", 1), ("loaded", 1), ("recorded", 2)])
def test_killed_at_a_stage_it_leaves_no_engine_and_every_finished_load(
    calibrating: Any, tiny: Path, tmp_path: Path, stage: str, loads: int
) -> None:
    process = calibrating(stage)
    process.kill()
    process.wait(200)
    until(lambda: not engines_of(tiny), f"the engine's end, harness killed at {stage!r}")
    record = record_of(tmp_path)
    assert (record["status"], len(record["loads"])) == ("partial", loads)


def test_a_load_whose_engine_is_killed_is_named_and_made_again(calibrating: Any, tiny: Path, tmp_path: Path) -> None:
    process = calibrating("loaded")
    (engine,) = engines_of(tiny)
    engine.kill()
    engine.wait(200)
    _, error = process.communicate("\n", timeout=200)
    assert process.returncode == 0, error
    record = record_of(tmp_path)
    found = [(load["request"]["context"], load["outcome"]) for load in record["loads"]]
    assert (record["status"], found) == ("complete", [(1024, "ok"), (2048, "failed"), (2048, "ok"), (4096, "ok")])
    assert "the engine ended with status 137 (SIGKILL)" in record["loads"][1]["reason"]


def calibrate(tmp_path: Path, model: Path, *arguments: str, **env: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "calibrate", str(model), "--engine", "llama-server", "--json", *arguments],
        cwd=tmp_path,
        env={**os.environ, "HARNESS_STORE": str(tmp_path / "store"), "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout)["data"]["calibration"])


@pytest.mark.requires("rpc")
def test_a_remote_device_is_a_gpu_and_its_log_predicts_a_context_never_loaded(tmp_path: Path, tiny: Path) -> None:
    from tests.support.truth import Device

    def measure(*arguments: str) -> dict[str, Any]:
        device.ensure()
        options = ("--engine-binary", str(programs() / "llama-server"), "--gpus", "RPC0", "--no-speed", *arguments)
        return calibrate(tmp_path, tiny, *options, "--env", f"LLAMA_ARG_RPC={device.address}", GGML_VK_VISIBLE_DEVICES="")

    with Device(tmp_path) as device:
        near = measure("--ctx", "4096,8192,16384")
        far = measure("--ctx", "24576,32768,49152", "--variant", "far")
    assert (near["metadata"]["machine"]["target"], near["metadata"]["machine"]["meter"]) == ("gpu", "log")
    constants = near["constants"]
    assert constants["kv_cache_gb_per_10k"] * GIB / 10_000 == pytest.approx(KV_PER_TOKEN, rel=0.001)
    for load in far["metadata"]["quality"]["loads"]:
        slopes = constants["kv_cache_gb_per_10k"] + constants["compute_gb_per_10k"]
        predicted = constants["base_vram_gb"] + load["context"] / 10_000 * slopes
        assert predicted == pytest.approx(load["total_gb"], rel=0.001)


@pytest.mark.requires("rpc")
def test_an_overridden_context_length_reaches_the_engine(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "short.gguf", train_context=2048)
    override = "LLAMA_ARG_OVERRIDE_KV=llama.context_length=int:16384"
    engine = ("--engine-binary", str(programs() / "llama-server"))
    options = (*engine, "--gpus", "none", "--no-speed", "--ctx", "8192,16384", "--env", override)
    calibration = calibrate(tmp_path, model, *options)
    assert [load["context"] for load in calibration["metadata"]["quality"]["loads"]] == [8192, 16384]
    log = next((tmp_path / "store" / "runs").glob("*/engine-1.log")).read_text()
    assert "n_ctx_train           = 16384" in log
