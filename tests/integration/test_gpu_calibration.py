"""The whole way to a GPU's calibration, without a GPU (``HARNESS_CI_DOCKERD=1``).

A second daemon gives containers "GPUs". The engine is the tests' Ollama, whose real llama-server computes on a device that
a process of its container lends it. A thread plays the driver: through a library that the unmodified nvidia-ml-py loads, it
names that process with the memory that it really holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.meters.host import HostMeter
from harness.sandboxes.cgroup import holds
from harness.units import GIB, MIB
from tests.support.fake_nvml import UUID, compile_library
from tests.support.gpu_daemon import GpuDaemon
from tests.support.images import ollama_image
from tests.support.models import KV_PER_TOKEN, write_tiny_llama
from tests.support.waiting import until

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.requires("ci-dockerd", "gcc", "rpc")
ROOT = Path(__file__).parents[2]
#: What a driver takes for a process besides what the engine asks of it.
CONTEXT = 300 * MIB
#: What others hold of the GPU, and of what harness must see none.
BASELINE = 500 * MIB
HELD = ("--env", "STANDIN_FAULT=hang@2")


class Driver(threading.Thread):
    """Keeps the library's state in step with the processes of the daemon's containers. ``more`` are further lines of it."""

    def __init__(self, client: DockerClient, folder: Path) -> None:
        super().__init__(daemon=True)
        self.client, self.state = client, folder / "state"
        compile_library(folder).rename(folder / "libnvidia-ml.so.1")
        self.environment = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML_STATE": str(self.state)}
        self.more: list[str] = []
        self.names_processes = True
        self._ending = threading.Event()
        self._write({})

    def run(self) -> None:
        while not self._ending.wait(0.02):
            sizes = {pid: HostMeter().read(frozenset({pid})).total_bytes for pid in self.processes(b"ggml-rpc-server")}
            self._write({pid: size + CONTEXT for pid, size in sizes.items() if size is not None})

    def stop(self) -> None:
        self._ending.set()
        self.join(60)

    def shows(self, line: str) -> None:
        """Have a further line in the state, and wait until it is there."""
        self.more = [line]
        until(lambda: line in self.state.read_text(), f"the driver's line {line}")

    def processes(self, program: bytes) -> set[int]:
        """Those of the daemon's containers that run a program, or that an interpreter runs it in."""
        containers = [str(one.id) for one in self.client.containers.list(ignore_removed=True)]
        found = set()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and program in b" ".join((folder / "cmdline").read_bytes().split(b"\0")[:2]):
                    found |= {int(folder.name)} if any(holds(int(folder.name), one) for one in containers) else set()
        return found

    def _write(self, processes: dict[int, int]) -> None:
        used = BASELINE + sum(processes.values())
        lines = ["driver 580.95.05", f"gpu {UUID} {24 * GIB} {used} NVIDIA Test", *self.more]
        lines += [f"process 0 C {pid} {size}" for pid, size in processes.items() if self.names_processes]
        part = self.state.with_suffix(".part")
        part.write_text("\n".join([*lines, ""]))
        part.replace(self.state)


@pytest.fixture(scope="module")
def daemon() -> Iterator[GpuDaemon]:
    with GpuDaemon() as started:
        yield started


@pytest.fixture(scope="module")
def client(daemon: GpuDaemon) -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.DockerClient(base_url=daemon.address)) as opened:
        yield opened


@pytest.fixture(scope="module")
def image(client: DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    registry = tmp_path_factory.mktemp("registry")
    write_tiny_llama(registry / "tiny.gguf")
    (registry / "registry.json").write_text(json.dumps({"tiny:latest": {"file": "tiny.gguf"}}))
    # glibc fills what it hands out, so that what the device has reserved is resident.
    return ollama_image(client, registry, devices=True, STANDIN_RPC="99999", MALLOC_PERTURB_="85")


@pytest.fixture
def driver(client: DockerClient, tmp_path: Path) -> Iterator[Driver]:
    started = Driver(client, tmp_path)
    started.start()
    yield started
    started.stop()


def start(
    daemon: GpuDaemon, driver: Driver, image: str, store: Path, contexts: str = "8192,16384", *more: str
) -> subprocess.Popen[str]:
    arguments = ["calibrate", "tiny", "--engine", "ollama", "--image", image, "--store", str(store), "--no-speed", "--json"]
    return subprocess.Popen(
        daemon.inside(sys.executable, "-m", "harness", *arguments, "--num-batch", "512", "--ctx", contexts, *more),
        cwd=ROOT,
        env={**os.environ, **driver.environment, "DOCKER_HOST": daemon.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def held_load(process: subprocess.Popen[str], driver: Driver, store: Path) -> set[int]:
    """Wait until the first load is recorded: the engine (``*HELD``) holds the second back until its processes get SIGUSR1."""

    def recorded() -> bool:
        return any(json.loads(path.read_text())["loads"] for path in (store / "runs").glob("*/record.json"))

    until(lambda: process.poll() is not None or recorded(), "the record of the first load", limit=240)
    engine = driver.processes(b"ollama_program.py")
    assert engine, "the run ended before its second load" if process.poll() is not None else "the engine is gone"
    return engine


def go_on(engine: set[int]) -> None:
    for pid in engine:
        os.kill(pid, signal.SIGUSR1)


def end(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, json.loads(out), err


def record_of(store: Path) -> dict[str, Any]:
    (path,) = (store / "runs").glob("*/record.json")
    return dict(json.loads(path.read_text()))


def test_a_gpu_is_calibrated(daemon: GpuDaemon, driver: Driver, image: str, client: DockerClient, tmp_path: Path) -> None:
    status, document, err = end(start(daemon, driver, image, tmp_path / "store", "8192,16384,24576"))

    assert status == 0, (document["errors"], err)
    calibration = document["data"]["calibration"]
    machine = calibration["metadata"]["machine"]
    assert (machine["target"], machine["sandbox"], machine["meter"]) == ("gpu", "docker", "nvml")
    assert [(gpu["uuid"], gpu["driver"]) for gpu in machine["gpus"]] == [(UUID, "580.95.05")]
    slope = calibration["constants"]["kv_cache_gb_per_10k"] * GIB / 10_000
    assert slope == pytest.approx(KV_PER_TOKEN, rel=0.001)
    overhead = calibration["metadata"]["breakdown_gb"]["overhead"] * GIB
    assert CONTEXT < overhead < CONTEXT + 100 * MIB, "the driver's own share, which no log tells"
    record = record_of(tmp_path / "store")
    assert record["before"]["devices"] == record["after"]["devices"] == {UUID: BASELINE}
    for load in record["loads"]:
        assert load["left_bytes"] == 0
        assert load["busy"]["devices"] == {UUID: load["busy"]["total_bytes"]}
        assert load["trace"]["device_peak_bytes"] >= load["busy"]["total_bytes"]
        assert not load["trace"].get("other_processes")
    assert client.containers.list(all=True, ignore_removed=True) == []


def test_where_the_driver_names_no_process_the_rise_of_the_gpu_is_measured_and_named(
    daemon: GpuDaemon, driver: Driver, image: str, tmp_path: Path
) -> None:
    """As under WSL2."""
    driver.names_processes = False

    status, document, err = end(start(daemon, driver, image, tmp_path / "store"))

    assert status == 0, (document["errors"], err)
    metadata = document["data"]["calibration"]["metadata"]
    assert CONTEXT < metadata["breakdown_gb"]["overhead"] * GIB < CONTEXT + 100 * MIB
    assert any("device-delta" in note for note in metadata["quality"]["notes"])
    assert {load["busy"]["basis"] for load in record_of(tmp_path / "store")["loads"] if load["busy"]} == {"device-delta"}


def test_another_process_in_the_middle_is_noted_and_figures_by_process_stand(
    daemon: GpuDaemon, driver: Driver, image: str, client: DockerClient, tmp_path: Path
) -> None:
    process = start(daemon, driver, image, tmp_path / "store", "8192,16384", *HELD)
    engine = held_load(process, driver, tmp_path / "store")
    driver.shows(f"process 0 G {os.getpid()} {2 * GIB}")
    go_on(engine)

    status, document, err = end(process)

    assert status == 0, (document["errors"], err)
    notes = document["data"]["calibration"]["metadata"]["quality"]["notes"]
    assert any(f"process {os.getpid()} by 2,048.0 MiB" in note for note in notes)
    assert client.containers.list(all=True, ignore_removed=True) == []


def test_a_gpu_that_is_lost_voids_the_run_at_once(
    daemon: GpuDaemon, driver: Driver, image: str, client: DockerClient, tmp_path: Path
) -> None:
    process = start(daemon, driver, image, tmp_path / "store", "8192,16384", *HELD)
    engine = held_load(process, driver, tmp_path / "store")
    driver.shows("fail nvmlDeviceGetMemoryInfo 15")
    go_on(engine)

    status, document, _ = end(process)

    assert (status, document["errors"][0]["code"]) == (5, "gpu-lost")
    assert record_of(tmp_path / "store")["status"] == "partial"
    assert client.containers.list(all=True, ignore_removed=True) == []


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # the SDK's own, where it cannot connect
def test_a_daemon_that_dies_under_a_calibration_ends_it_and_comes_back_clean(
    daemon: GpuDaemon, driver: Driver, image: str, client: DockerClient, tmp_path: Path
) -> None:
    """The last test here: it kills the daemon that all share, and starts it again."""
    process = start(daemon, driver, image, tmp_path / "store", "8192,16384", *HELD)
    engine = held_load(process, driver, tmp_path / "store")
    driver.stop()  # it asks the daemon, too
    daemon.kill()
    go_on(engine)

    status, document, _ = end(process)

    assert (status, document["errors"][0]["code"]) == (69, "docker-gone")
    record = record_of(tmp_path / "store")
    assert (record["status"], [load["outcome"] for load in record["loads"]]) == ("partial", ["ok"])
    daemon.start()
    until(
        lambda: client.containers.list(all=True, ignore_removed=True) == [],
        "the end of the container, by the reaper that waited",
        limit=240,
    )
