"""Ollama in real containers, with the stand-in in its place: measured end to end, and everything that goes wrong on the way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from harness.engines.gguf import sha256
from harness.errors import BusyError, CannotWriteError, EngineError, HarnessError, NotFoundError
from harness.measure.calibrate import Result
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.meters.host import HostMeter
from harness.model.record import Gpu, Load
from harness.model.trace import MeterName, Reading
from harness.options import RunOptions
from harness.ownership import KIND, LABEL, OWNER_PID
from harness.sandboxes.docker_client import Daemon
from harness.store.store import Store, read_record
from harness.units import GIB
from tests.support.images import ollama_image
from tests.support.models import KV_PER_TOKEN
from tests.support.ollama import TRAIN_CONTEXT, registry

if TYPE_CHECKING:
    from docker import DockerClient
from tests.support.waiting import alive

pytestmark = pytest.mark.requires("docker", "embedded")
CONTEXTS = (1024, 2048, 4096)


@pytest.fixture(scope="module")
def client() -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.from_env()) as opened:
        yield opened


@pytest.fixture(scope="module")
def image(client: DockerClient) -> str:
    return ollama_image(client, registry())


@pytest.fixture
def volume(client: DockerClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A volume of this test's own where pulled models are kept."""
    name = f"harness-test-{uuid.uuid4().hex}"
    monkeypatch.setattr("harness.engines.ollama.recipe.VOLUME", name)
    yield name
    with contextlib.suppress(Exception):
        client.volumes.get(name).remove()


@pytest.fixture(autouse=True)
def nothing_stays(image: str, client: DockerClient) -> Iterator[None]:
    """However a calibration ends, no container of it is left; those of a run beside the tests have another owner, who lives."""
    yield
    found = client.containers.list(all=True, ignore_removed=True, filters={"ancestor": image})
    owners = [int(one.labels[OWNER_PID]) for one in found]
    assert not [pid for pid in owners if pid == os.getpid() or not alive(pid)]


def calibrate(folder: Path, image: str, model: str = str(registry() / "tiny.gguf"), **request: Any) -> Result:
    """Calibrate on host memory, with the knobs of the stand-in among the request' ``env``."""
    asked_for = {"contexts": CONTEXTS, "speed": False, "timeout": 200.0, **request}
    asked = RunOptions(model=model, engine="ollama", gpus="none", image=image, **asked_for)
    return prepare(asked, Store(folder / "store"), folder).calibrate(Observer())


def loads(folder: Path) -> tuple[Load, ...]:
    (path,) = (folder / "store").parent.glob("**/record.json")
    return read_record(path).loads


def test_a_file_is_measured_end_to_end(image: str, tmp_path: Path) -> None:
    """As a user types it: the slope is the model's own, and the artifact names what ran."""
    file = registry() / "tiny.gguf"
    arguments = ("--engine", "ollama", "--gpus", "none", "--image", image, "--ctx", "1024,2048,4096", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "harness", "calibrate", str(file), *arguments],
        cwd=tmp_path,
        env={**os.environ, "HARNESS_STORE": str(tmp_path / "store"), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 0, answer
    calibration = answer["data"]["calibration"]
    metadata = calibration["metadata"]
    slope = calibration["constants"]["kv_cache_gb_per_10k"] * GIB / 10_000
    assert slope == pytest.approx(KV_PER_TOKEN, rel=0.001)
    assert calibration["id"] == "ollama/tiny"
    assert metadata["model"]["digest"] == sha256(file)
    assert metadata["engine"]["version"] == "0.33.0"
    assert metadata["engine"]["image"] == image
    assert metadata["engine"]["image_digest"].startswith("sha256:")
    assert metadata["machine"] == {"target": "host", "sandbox": "docker", "meter": "host", "gpus": []}
    assert [band["num_batch"] for band in metadata["bands"]] == [512]
    assert metadata["quality"]["valid_to"] == TRAIN_CONTEXT
    assert metadata["quality"]["max_error"] < 0.01
    speed, notes = metadata["performance"]["decode_tokens_per_s"], metadata["quality"]["notes"]
    assert (speed or 0) > 0 or any(note.startswith("speed") for note in notes), "a busy machine leaves none"
    assert image in done.stderr


def test_a_model_is_pulled_once_and_its_volume_can_be_lent(image: str, volume: str, tmp_path: Path) -> None:
    """The volume stays; mounted read-only it serves the next calibration, and what it lacks is not pulled."""
    first = calibrate(tmp_path / "1", image, "tiny", contexts=(1024, 2048))
    assert first.calibration.metadata.model.digest == sha256(registry() / "tiny.gguf")
    calibrate(tmp_path / "2", image, "tiny", models=volume, contexts=(1024, 2048))
    pulls = [next((tmp_path / one).glob("**/engine-0.log")).read_text().count("/api/pull") for one in "12"]
    assert pulls == [1, 0]
    with pytest.raises(NotFoundError) as caught:
        calibrate(tmp_path / "3", image, "embedder", models=volume)
    assert "tiny:latest" in str(caught.value.hint)
    with Daemon() as daemon:
        (kept,) = [one for one in daemon.volumes(f"{LABEL}=1") if one["Name"] == volume]
    assert kept["Labels"][KIND] == "models"


def test_a_volume_that_does_not_exist_is_not_made(image: str, client: DockerClient, tmp_path: Path) -> None:
    name = f"harness-test-{uuid.uuid4().hex}"
    with pytest.raises(NotFoundError):
        calibrate(tmp_path, image, "tiny", models=name)
    assert name not in [one.name for one in client.volumes.list()]


def test_no_room_for_the_model(image: str, volume: str, client: DockerClient, tmp_path: Path) -> None:
    client.volumes.create(volume, driver_opts={"type": "tmpfs", "device": "tmpfs", "o": "size=1m"})
    with pytest.raises(CannotWriteError) as caught:
        calibrate(tmp_path, image, "tiny")
    assert caught.value.code == "disk-full"


@pytest.mark.parametrize(
    ("fault", "kind", "code", "kept"),
    [
        ("crash@0", EngineError, "engine-ended", 0),
        ("crash@2", EngineError, "engine-ended", 1),
        ("hang@1", BusyError, "engine-timeout", 0),
    ],
)
def test_an_engine_that_fails_is_named_and_what_was_measured_is_kept(
    image: str, tmp_path: Path, fault: str, kind: type[HarnessError], code: str, kept: int
) -> None:
    with pytest.raises(kind) as caught:
        calibrate(tmp_path, image, env={"STANDIN_FAULT": fault}, timeout=2.0 if fault.startswith("hang") else 200.0)
    assert caught.value.code == code
    if fault == "crash@2":
        assert isinstance(caught.value, EngineError)
        assert any("nil pointer" in line for line in caught.value.tail)
    assert len(loads(tmp_path)) == kept
    assert not list(tmp_path.glob("store/**/*.yaml"))


def test_a_container_that_runs_out_of_memory_is_an_observation(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.sandboxes.docker._available_memory", lambda: 512 << 20)
    result = calibrate(tmp_path, image, env={"STANDIN_FAULT": "bloat@2"})
    made = loads(tmp_path)
    assert [(load.request.context, load.outcome) for load in made[:3]] == [(1024, "ok"), (2048, "wont-fit"), (4096, "skipped")]
    assert "needed more memory than its container may have" in (made[1].reason or "")
    assert result.calibration.metadata.quality.valid_to == 1024


def test_a_runner_that_is_killed_once_is_loaded_again_and_its_context_did_fit(image: str, tmp_path: Path) -> None:
    """The server lives on. Nothing says that memory was short, so the kill is no verdict on the context."""
    result = calibrate(tmp_path, image, env={"STANDIN_FAULT": "kill-runner@3"})
    assert [load.outcome for load in loads(tmp_path)] == ["ok", "ok", "failed", "ok"]
    quality = result.calibration.metadata.quality
    assert [load.context for load in quality.loads] == [1024, 2048, 4096]
    assert quality.valid_to == TRAIN_CONTEXT


def test_a_runner_that_is_killed_again_ends_the_run(image: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        calibrate(tmp_path, image, env={"STANDIN_FAULT": "kill-runner@3+"})
    assert (caught.value.code, caught.value.exit_code) == ("engine-killed", 70)
    assert any("error loading llama server" in line for line in caught.value.tail)
    assert not list(tmp_path.glob("store/**/*.yaml"))


def test_a_file_that_ollama_keeps_with_other_bytes_is_known_by_its_own(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its speed is timed by a second server, which is sent the file too; and a second run finds the same model."""
    monkeypatch.setattr("harness.measure.timing.SPEED_BUDGET", 0.0)  # a busy machine would time it again for two minutes
    file = registry() / "tiny.gguf"
    for run in range(2):
        result = calibrate(tmp_path, image, env={"STANDIN_REWRITES": "1"}, speed=run == 0, contexts=(1024, 2048))
        model = result.calibration.metadata.model
        assert model.digest == sha256(file)
        assert model.stored_digest not in (None, model.digest)
        assert not any("Ollama cannot" in note for note in result.calibration.metadata.quality.notes)


class DeviceMeter:
    """In NVML's place: the memory of the process that acts as the device."""

    name: MeterName = "nvml"
    interval = 0.05

    def __init__(self) -> None:
        self._host = HostMeter()

    def read(self, pids: frozenset[int]) -> Reading:
        return self._host.read(frozenset(pid for pid in pids if self._is_device(pid)))

    def close(self) -> None:
        pass

    @staticmethod
    def _is_device(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/comm").read_text() == "ggml-rpc-server\n"
        return False


@pytest.mark.requires("rpc")
def test_a_device_is_measured_after_a_prompt_and_what_spills_ends_the_plan_earlier(
    client: DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device too small for the largest context: that load is an observation, and what fits is measured."""
    image = ollama_image(client, registry(), devices=True)
    monkeypatch.setattr("harness.measure.setup.open_meter", lambda _: DeviceMeter())
    request = RunOptions(
        model=str(registry() / "tiny.gguf"), engine="ollama", gpus="none", image=image, contexts=CONTEXTS, speed=False,
        env={"STANDIN_RPC": "2048", "MALLOC_PERTURB_": "85"}, timeout=60.0,
    )  # fmt: skip
    session = prepare(request, Store(tmp_path / "store"), tmp_path)
    device = msgspec.structs.replace(session.choice, target="gpu", meter="nvml", gpus=(Gpu(name="RPC0"),))
    options = msgspec.structs.replace(session.options, target="gpu", memory_limit=None)

    result = msgspec.structs.replace(session, choice=device, options=options).calibrate(Observer())

    first = loads(tmp_path)[0]
    assert first.idle is not None
    assert first.busy is not None
    assert first.request_seconds > 0
    quality = result.calibration.metadata.quality
    assert [load.context for load in quality.loads] == [1024, 2048, 1536]
    assert any("4,096" in note and "only 1 of 3 layers are on the GPU" in note for note in quality.notes)
    assert any("/api/ps" in note for note in quality.notes), "the stand-in says that nothing is on the GPU"
    assert result.calibration.constants.kv_cache_gb_per_10k * GIB / 10_000 == pytest.approx(KV_PER_TOKEN, rel=0.001)
