"""``harness serve`` on a real engine: a command in front of a model, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

import harness
from harness.inventory.digests import cached_sha256
from harness.model.calibration import Calibration
from harness.model.record import Gpu, Machine
from harness.ownership import OWNER_PID
from harness.store.store import Store
from tests.support.background import Start, background, engines_of
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.images import ollama_image
from tests.support.models import write_tiny_llama
from tests.support.ollama import registry
from tests.support.rpc import programs
from tests.support.waiting import alive, until

pytestmark = pytest.mark.requires("embedded")
#: What a command finds in its environment, and whether the model answers there.
PROBE = """
import json, os, urllib.request
names = ("HARNESS_ENDPOINT", "HARNESS_CONTEXT", "HARNESS_MODEL", "OPENAI_BASE_URL")
with urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/models") as answer:
    models = [one["id"] for one in json.load(answer)["data"]]
print(json.dumps({**{name: os.environ[name] for name in names}, "models": models}))
raise SystemExit(7)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Iterator[Start]:
    with background(tmp_path) as start:

        def begin(*arguments: str, model: str = str(model), **env: str) -> subprocess.Popen[str]:
            return start("serve", model, *arguments, **env)

        yield begin


def leftovers(store: Path) -> list[str]:
    return [str(one) for one in store.glob("runs/*-serve-*")]


def host(name: str = "tiny", weights: Path | None = None) -> Calibration:
    """Made up, of these weights."""
    made = on_host(made_up(name, gpu=None))
    digest = cached_sha256(weights) if weights else made.metadata.model.digest
    model = msgspec.structs.replace(made.metadata.model, digest=digest)
    return msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, model=model))


def test_a_command_finds_the_model_and_its_status_is_ours(start: Start, model: Path, tmp_path: Path) -> None:
    store_of(tmp_path / "store", host(weights=model))
    process = start("--ctx", "1024", "--available", "24GiB", "--", sys.executable, "-c", PROBE)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 7, err
    found = json.loads(out)
    assert found["OPENAI_BASE_URL"] == f"{found['HARNESS_ENDPOINT']}/v1"
    assert found["HARNESS_CONTEXT"] == "1024"
    assert found["models"] == [found["HARNESS_MODEL"]]
    assert "FITS: needs 4,504 MiB" in err
    assert not engines_of(model)
    assert not leftovers(tmp_path / "store")


def test_what_would_spill_is_refused_before_anything_starts(start: Start, model: Path, tmp_path: Path) -> None:
    store_of(tmp_path / "store", host(weights=model))
    process = start("--ctx", "1024", "--available", "2GiB", "--on-offload", "refuse", "--json", "--", "false")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 3
    assert "CPU OFFLOAD LIKELY" in json.loads(out)["errors"][0]["message"]
    assert not leftovers(tmp_path / "store")
    unknown = start("--ctx", "1024", "--engine", "ollama", "--on-offload", "refuse", "--measured-only", "--", "false")
    assert "harness calibrate" in unknown.communicate(timeout=200)[1]
    assert unknown.returncode == 4


def test_what_would_spill_is_made_smaller_where_that_was_asked_for(start: Start, model: Path, tmp_path: Path) -> None:
    store_of(tmp_path / "store", host(weights=model))
    process = start("--ctx", "32768", "--available", "4628", "--on-offload", "shrink", "--", sys.executable, "-c", PROBE)
    out, err = process.communicate(timeout=200)
    assert 256 <= int(json.loads(out)["HARNESS_CONTEXT"]) < 32768
    assert "instead of 32,768" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_what_ends_serve_ends_the_command_and_the_engine(
    start: Start, model: Path, number: signal.Signals, status: int
) -> None:
    wait = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    process = start("--ctx", "1024", "--gpus", "none", "--", sys.executable, "-c", wait)
    assert process.stdout is not None
    command = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == status
    until(lambda: not alive(command), "the command's end")
    until(lambda: not engines_of(model), "the engine's end")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_without_a_command_it_stays_until_it_is_ended(
    start: Start, model: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = start("--ctx", "1024", "--gpus", "none")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("endpoint http://127.0.0.1:")
    assert engines_of(model)
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == status
    until(lambda: not engines_of(model), "the engine's end")
    if number != signal.SIGKILL:
        assert not leftovers(tmp_path / "store")


def test_an_engine_that_is_killed_is_said_and_its_log_kept(start: Start, model: Path, tmp_path: Path) -> None:
    process = start("--ctx", "1024", "--gpus", "none", "--json")

    def served() -> list[psutil.Process]:
        """Not the dry runs before it."""
        found = engines_of(model)
        with contextlib.suppress(psutil.NoSuchProcess):
            return [one for one in found if "--no-alloc" not in one.cmdline()]
        return []

    (engine,) = until(served, "the engine")
    until(lambda: any(one.status == "LISTEN" for one in engine.net_connections()), "its port")
    engine.kill()
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 70
    assert json.loads(out)["errors"][0]["code"] == "engine-killed"
    assert len(leftovers(tmp_path / "store")) == 1


def test_as_a_library_it_lasts_as_long_as_its_block(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with harness.serve(str(model), ctx=1024, gpus="none", store=tmp_path) as server:
        assert httpx.get(f"{server.endpoint}/health", trust_env=False, timeout=200).json() == {"status": "ok"}
        assert server.observed_placement == "everything is in host memory"
        assert len(engines_of(model)) == 1
    assert "not measured: llama.cpp's own plan of the load" in caplog.text
    assert not engines_of(model)
    with (
        pytest.raises(harness.UnknownVerdictError),
        harness.serve(str(model), ctx=1024, store=tmp_path, on_offload="refuse", measured_only=True),
    ):
        pytest.fail("it was started")


@pytest.mark.requires("vulkan")
def test_a_verdict_that_was_wrong_is_said_and_kept(start: Start, tmp_path: Path) -> None:
    machine = Machine(target="gpu", sandbox="process", meter="log", gpus=(Gpu(name="another"),))
    metadata = made_up("tiny").metadata
    wrong = msgspec.structs.replace(made_up("tiny"), metadata=msgspec.structs.replace(metadata, machine=machine))
    store = store_of(tmp_path / "store", wrong)
    process = start(
        "--ctx",
        "1024",
        "--gpus",
        "Vulkan0",
        "--json",
        "--engine-binary",
        str(programs() / "llama-server"),
        "--",
        "true",
        GGML_VK_VISIBLE_DEVICES="0",
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    data = json.loads(out)["data"]
    assert data["verdict"] == "offload"
    assert "everything is on the GPU" in data["disagreement"]
    assert data["disagreement"] in err
    record = json.loads(Path(data["record"]).read_text())
    assert record["loads"][0]["request"]["purpose"] == "serve"
    assert data["disagreement"] in record["notes"][0]
    assert Path(data["record"]).parent in list(Store(store.root).runs())


#: As :data:`PROBE`, where Ollama's own variable leads.
OLLAMA_PROBE = """
import json, os, urllib.request
with urllib.request.urlopen(os.environ["OLLAMA_HOST"] + "/api/ps") as answer:
    (loaded,) = json.load(answer)["models"]
print(json.dumps({"asked": os.environ["HARNESS_MODEL"], "loaded": loaded["model"], "context": loaded["context_length"]}))
"""


@pytest.mark.requires("docker")
def test_ollama_is_served_from_its_container_and_the_container_is_gone(start: Start, tmp_path: Path) -> None:
    docker = pytest.importorskip("docker")
    client = docker.from_env()
    try:
        image = ollama_image(client, registry())
        process = start(
            *("--ctx", "2048", "--engine", "ollama", "--gpus", "none", "--image", image, "--"),
            *(sys.executable, "-c", OLLAMA_PROBE),
            model=str(registry() / "tiny.gguf"),
        )
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        found = json.loads(out)
        assert found["asked"] == found["loaded"]
        assert found["context"] == 2048
        ours = {"label": f"{OWNER_PID}={process.pid}"}
        assert client.containers.list(all=True, ignore_removed=True, filters=ours) == []
        assert not leftovers(tmp_path / "store")
    finally:
        client.close()
