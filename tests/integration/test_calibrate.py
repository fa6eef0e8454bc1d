"""A real engine, measured end to end: on host memory, on the software GPU, on an rpc device."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.units import GIB
from tests.support.background import Start, background, engines_of
from tests.support.f16 import rpc_weights
from tests.support.models import write_tiny_llama
from tests.support.rpc import programs
from tests.support.truth import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.requires("embedded")
KV_PER_TOKEN = 3 * 1024  # gemma3-270m: 3 full-attention layers of 18, one KV head of 256 + 256 values, two bytes each


@pytest.fixture
def start(tmp_path: Path, gemma_gguf: Path) -> Iterator[Start]:
    """Start ``harness calibrate`` on the real weights, in the background."""
    with background(tmp_path) as start:

        def begin(*arguments: str, model: str = str(gemma_gguf), **env: str) -> subprocess.Popen[str]:
            return start("calibrate", model, "--engine", "llama-server", *arguments, **env)

        yield begin


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=300)
    return json.loads(out), err


def test_host_memory_is_measured_and_fit_gives_the_same_bytes(start: Start, gemma_gguf: Path, tmp_path: Path) -> None:
    answer, err = finish(start("--gpus", "none", "--ctx", "4096,8192,16384", "--json"))
    assert answer["exit_code"] == 0, answer
    calibration = answer["data"]["calibration"]
    slope = calibration["constants"]["kv_cache_gb_per_10k"] * GIB / 10_000
    assert slope == pytest.approx(KV_PER_TOKEN, rel=0.001)
    assert calibration["metadata"]["machine"] == {
        "target": "host", "sandbox": "process", "meter": "host", "gpus": [],
    }  # fmt: skip
    assert calibration["metadata"]["quality"]["max_error"] < 0.01
    speed, notes = calibration["metadata"]["performance"]["decode_tokens_per_s"], calibration["metadata"]["quality"]["notes"]
    assert (speed or 0) > 0 or any(note.startswith("speed") for note in notes), "a busy machine leaves none"
    assert "4,096 tokens" in err
    artifact, record = Path(answer["data"]["artifact"]), Path(answer["data"]["record"])
    again = tmp_path / "again.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "harness", "fit", str(record.parent), "-o", str(again)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0
    assert again.read_bytes() == artifact.read_bytes()
    assert not engines_of(gemma_gguf)


def test_a_prediction_meets_a_context_never_loaded(start: Start) -> None:
    first, _ = finish(start("--gpus", "none", "--ctx", "4096,8192,16384", "--no-speed", "--json"))
    second, _ = finish(start("--gpus", "none", "--ctx", "24576,32768", "--no-speed", "--variant", "far", "--json"))
    constants = first["data"]["calibration"]["constants"]
    for load in second["data"]["calibration"]["metadata"]["quality"]["loads"]:
        units = load["context"] / 10_000
        predicted = constants["base_vram_gb"] + units * (constants["kv_cache_gb_per_10k"] + constants["compute_gb_per_10k"])
        assert predicted == pytest.approx(load["total_gb"], rel=0.01)


@pytest.mark.requires("vulkan")
def test_a_gpu_without_a_driver_meter_is_logged_and_says_so(start: Start, gemma_gguf: Path) -> None:
    options = ("--engine-binary", str(programs() / "llama-server"), "--ctx", "4096,8192,16384", "--no-speed", "--json")
    weights = str(rpc_weights(gemma_gguf))
    answer, _ = finish(start("--gpus", "Vulkan0", *options, model=weights, GGML_VK_VISIBLE_DEVICES="0"))
    assert answer["exit_code"] == 0, answer
    metadata = answer["data"]["calibration"]["metadata"]
    assert (metadata["machine"]["target"], metadata["machine"]["meter"]) == ("gpu", "log")
    assert metadata["breakdown_gb"]["overhead"] is None
    slope = answer["data"]["calibration"]["constants"]["kv_cache_gb_per_10k"] * GIB / 10_000
    assert slope == pytest.approx(KV_PER_TOKEN, rel=0.001)
    assert metadata["quality"]["max_error"] < 0.001


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_whatever_ends_harness_ends_the_engine_and_keeps_the_record(
    start: Start, gemma_gguf: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = start("--gpus", "none", "--ctx", "4096,8192,16384", "--json")
    runs = tmp_path / "store" / "runs"
    until(lambda: any(runs.glob("*/record.json")) and bool(engines_of(gemma_gguf)), "a load recorded, another running")
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == status
    until(lambda: not engines_of(gemma_gguf), "the engine's end")
    record = json.loads(next(runs.glob("*/record.json")).read_text())
    assert record["status"] == "partial"
    assert record["loads"]
    assert not list((tmp_path / "store").glob("*/*.yaml"))


def test_two_calibrations_of_one_artifact_do_not_mix(start: Start, gemma_gguf: Path) -> None:
    first = start("--gpus", "none", "--ctx", "4096,8192,16384", "--json")
    until(lambda: bool(engines_of(gemma_gguf)), "the first one's engine")
    first.send_signal(signal.SIGSTOP)  # it holds what it holds, and cannot be done before the second asks
    second, _ = finish(start("--gpus", "none", "--ctx", "4096,8192", "--json"))
    assert second["exit_code"] == 75
    first.kill()
    first.communicate(timeout=200)
    until(lambda: not engines_of(gemma_gguf), "the engine's end")


def test_a_context_that_cannot_fit_is_an_observation_and_the_plan_shrinks(start: Start, tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "far.gguf", train_context=100_000_000))
    answer, _ = finish(start("--gpus", "none", "--ctx", "4096,8192,64000000", "--no-speed", "--json", model=model))
    assert answer["exit_code"] == 0, answer
    quality = answer["data"]["calibration"]["metadata"]["quality"]
    assert [load["context"] for load in quality["loads"]] == [4096, 8192, 6144]
    assert any("64,000,000" in note and "could not allocate" in note for note in quality["notes"])


def script(tmp_path: Path, body: str, mode: int = 0o755) -> str:
    path = tmp_path / "engine"
    path.write_text(f'#!/bin/sh\ncase "$1" in --list-devices | --version) exit 0 ;; esac\n{body}\n')
    path.chmod(mode)
    return str(path)


def test_a_remote_device_that_is_gone_is_named_and_not_the_engine(start: Start, tmp_path: Path) -> None:
    binary = tmp_path / "engine"
    binary.write_text("#!/bin/sh\nexit 134\n")
    binary.chmod(0o755)
    gone = f"127.0.0.1:{free_port()}"
    answer, _ = finish(start("--engine-binary", str(binary), "--gpus", "RPC0", "--env", f"LLAMA_ARG_RPC={gone}", "--json"))
    (error,) = answer["errors"]
    assert (error["code"], gone in error["message"]) == ("rpc-silent", True)
    assert "ggml-rpc-server" in error["hint"]


@pytest.mark.parametrize(
    ("body", "mode", "timeout", "status", "says"),
    [
        ("echo 'bad \033[31mthing'; exit 3", 0o755, "200", 70, "status 3"),
        ("kill -ILL $$", 0o755, "200", 70, "illegal instruction"),
        ("exec sleep 600", 0o755, "1", 75, "did not answer"),
        ("exit 0", 0o644, "200", 77, "not executable"),
    ],
)
def test_an_engine_that_does_not_work_is_named(
    start: Start, tmp_path: Path, body: str, mode: int, timeout: str, status: int, says: str
) -> None:
    binary = script(tmp_path, body, mode)
    answer, err = finish(start("--engine-binary", binary, "--gpus", "none", "--timeout", timeout, "--json"))
    assert answer["exit_code"] == status
    assert says in answer["errors"][0]["message"]
    assert "\033" not in err


def test_a_missing_engine_is_not_found(start: Start) -> None:
    answer, _ = finish(start("--engine-binary", "/nowhere/llama-server", "--gpus", "none", "--json"))
    assert answer["exit_code"] == 66


def test_a_context_beyond_the_training_is_refused_before_anything_starts(start: Start, tmp_path: Path) -> None:
    answer, _ = finish(start("--gpus", "none", "--ctx", "65536", "--json"))
    assert answer["exit_code"] == 2
    assert not (tmp_path / "store").exists()


def test_an_output_that_cannot_be_written_is_found_before_measuring(start: Start, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    answer, _ = finish(start("--gpus", "none", "--json"))
    assert answer["exit_code"] == 73
