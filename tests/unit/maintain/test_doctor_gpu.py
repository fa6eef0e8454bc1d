"""What ``doctor`` finds on a machine with a GPU, and that its page explains each finding."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from harness.engines.ollama.recipe import Ollama
from harness.errors import HarnessError
from harness.inventory import docker
from harness.inventory.machine import LocalMachine
from harness.maintain import doctor_gpu
from harness.maintain.doctor_gpu import docker_findings, nvidia_findings
from harness.ownership import LABEL, OWNER_BOOT, OWNER_PID
from harness.sandboxes import docker_client
from harness.sandboxes.daemon import read_daemon
from tests.support.fake_nvml import GIB, FakeDriver, library

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "how-to" / "gpu-box.md").read_text()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr(doctor_gpu, "on_wsl", lambda: False)
    return FakeDriver(library(), tmp_path / "state", monkeypatch)


def codes() -> dict[str, str]:
    machine = LocalMachine()
    gpus = () if isinstance(machine.nvidia, HarnessError) else machine.nvidia
    return {finding.code: finding.state for finding in (*nvidia_findings(machine), *Ollama().findings(gpus))}


@pytest.mark.requires("gcc")
@pytest.mark.parametrize(
    ("state", "code", "kind"),
    [
        ("", "process-memory-untried", "ok"),
        (f"process 0 C {os.getpid()} 5", "process-memory-ok", "ok"),
        (f"process 0 C {os.getpid()} NA", "process-memory-none", "note"),
        (f"process 0 C {os.getpid()} 0", "process-memory-none", "note"),
        ("process 0 C 4194303 5", "pids-foreign", "missing"),
        (f"mig 0 MIG-aaaa {GIB} 0 NVIDIA Test A MIG", "gpu-mig", "note"),
        ("fail nvmlDeviceGetMemoryInfo 3", "gpu-unified", "note"),
        ("fail nvmlDeviceGetMemoryInfo 999", "gpu-silent", "note"),
        ("fail nvmlDeviceGetComputeRunningProcesses_v3 15", "gpu-lost", "missing"),
        ("driver 580.95.05", "driver-ok", "ok"),
        ("driver 560.35.03", "driver-middle", "note"),
        ("driver 535.1", "driver-old", "missing"),
        ("driver odd", "driver-unknown", "note"),
        ("fail nvmlInitWithFlags 4", "not-permitted", "missing"),
        ("fail nvmlSystemGetDriverVersion 999", "no-nvml", "missing"),
    ],
)
def test_what_the_driver_says(driver: FakeDriver, state: str, code: str, kind: str) -> None:
    driver.holds(state)
    assert codes().get(code) == kind


@pytest.mark.requires("gcc")
def test_without_a_driver_a_gpu_in_the_machine_gets_a_hint(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.unload()
    monkeypatch.setattr(doctor_gpu, "has_device", lambda: True)
    (finding,) = nvidia_findings(LocalMachine())
    assert (finding.code, finding.state) == ("no-nvml", "missing")
    assert "libnvidia-ml" in str(finding.hint)


class Answers:
    """A daemon that says these things of itself and holds these containers."""

    def __init__(self, info: dict[str, Any], containers: tuple[dict[str, Any], ...] = ()) -> None:
        self._info, self._containers = info, containers

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def facts(self) -> object:
        return read_daemon("unix:///x", {"Version": "28.0"}, self._info)

    def containers(self, label: str) -> tuple[dict[str, Any], ...]:
        return self._containers

    def volumes(self, label: str) -> tuple[dict[str, Any], ...]:
        return ()

    def networks(self, label: str) -> tuple[dict[str, Any], ...]:
        return ()


ABANDONED = {"Id": "c", "Names": ["/harness-x"], "Labels": {LABEL: "1", OWNER_PID: "1", OWNER_BOOT: "another"}}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (Answers({"Runtimes": {"nvidia": {}}}), {"docker-ok": "ok", "gpu-runtime-ok": "ok"}),
        (Answers({"Runtimes": {}}), {"docker-ok": "ok", "gpu-runtime-missing": "missing"}),
        (Answers({"OperatingSystem": "Docker Desktop"}), {"docker-desktop": "missing"}),
        (Answers({"Runtimes": {"nvidia": {}}}, (ABANDONED,)), {"docker-ok": "ok", "gpu-runtime-ok": "ok", "leftovers": "note"}),
    ],
)
def test_what_the_daemon_says(monkeypatch: pytest.MonkeyPatch, answers: Answers, expected: dict[str, str]) -> None:
    monkeypatch.setattr(docker_client, "Daemon", lambda **_: answers)
    monkeypatch.setattr(doctor_gpu, "has_device", lambda: True)
    monkeypatch.setattr(docker, "HOOK", "no-such-hook")
    assert {finding.code: finding.state for finding in docker_findings()} == expected


def test_the_disk_of_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_client, "Daemon", lambda **_: Answers({"DockerRootDir": str(tmp_path)}))
    for room, code in ((0, "disk-ok"), (1 << 62, "disk-low")):
        monkeypatch.setattr(doctor_gpu, "ROOM", room)
        assert code in {finding.code for finding in docker_findings()}


@pytest.mark.parametrize(("address", "code"), [("unix:///no/such.sock", "docker-absent"), ("tcp://box:1", "docker-remote")])
def test_no_daemon_to_ask(monkeypatch: pytest.MonkeyPatch, address: str, code: str) -> None:
    monkeypatch.setenv("DOCKER_HOST", address)
    (finding,) = docker_findings()
    assert (finding.code, finding.state) == (code, "missing")
    assert finding.hint


def codes_in(*files: str) -> set[str]:
    """Values of ``code="…"`` in calls."""
    calls = (node for file in files for node in ast.walk(ast.parse((ROOT / "harness" / file).read_text())))
    return {
        word.value.value
        for node in calls
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "code" and isinstance(word.value, ast.Constant) and isinstance(word.value.value, str)
    }


def test_the_page_explains_every_finding() -> None:
    found = codes_in("maintain/doctor_gpu.py", "maintain/doctor_drm.py", "engines/ollama/findings.py")
    assert len(found) > 15
    assert {code for code in found if f"`{code}`" not in PAGE} == set()


def test_the_page_explains_what_meter_gpu_and_daemon_end_a_calibration_with() -> None:
    found = codes_in(
        "meters/nvml.py", "meters/drm.py", "meters/sampler.py", "inventory/gpus.py", "inventory/docker.py",
        "measure/interference.py", "sandboxes/locks.py", "sandboxes/docker.py", "sandboxes/daemon.py",
    )  # fmt: skip
    found -= {"image-unavailable", "container-gone"}  # of any machine
    assert {code for code in found | {"stranger-moved", "baseline-moved"} if f"`{code}`" not in PAGE} == set()
