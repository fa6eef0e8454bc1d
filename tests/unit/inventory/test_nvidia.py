"""Which GPUs a run uses and how they are measured; whether a container can have one. The driver is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.engines.base import Options
from harness.errors import UnavailableError, UsageError
from harness.inventory import docker, gpus
from harness.inventory.docker import docker_gpu_obstacle
from harness.inventory.gpus import nvidia_gpus
from harness.sandboxes import docker_client
from harness.sandboxes.base import GpuRequest
from harness.sandboxes.daemon import read_daemon
from tests.support.fake_nvml import GIB, OTHER, UUID, FakeDriver, library


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr(gpus, "on_wsl", lambda: False)
    return FakeDriver(library(), tmp_path / "state", monkeypatch)


def chosen(asked: str) -> tuple[list[str | None], str, str]:
    found, meter, words = nvidia_gpus(Options(gpus=GpuRequest.parse(asked)))
    return [gpu.uuid for gpu in found], meter, words


MIG = (f"mig 0 MIG-aaaa {10 * GIB} 0 NVIDIA Test A MIG 3g.10gb", f"mig 0 MIG-bbbb {5 * GIB} 0 NVIDIA Test A MIG 1g.5gb")


@pytest.mark.requires("gcc")
@pytest.mark.parametrize(("gpus", "uuids"), [("all", [UUID, OTHER]), ("1", [OTHER]), (UUID, [UUID]), ("0,1", [UUID, OTHER])])
def test_gpus_are_named_by_index_or_uuid(driver: FakeDriver, gpus: str, uuids: list[str]) -> None:
    assert chosen(gpus) == (uuids, "nvml", "measured by NVML")


@pytest.mark.requires("gcc")
def test_a_gpu_that_is_not_there_is_told_with_those_that_are(driver: FakeDriver) -> None:
    with pytest.raises(UnavailableError, match=UUID) as caught:
        chosen("7")
    assert caught.value.code == "no-such-gpu"


@pytest.mark.requires("gcc")
def test_of_a_split_gpu_one_instance_must_be_named(driver: FakeDriver) -> None:
    driver.holds(*MIG)
    assert chosen("MIG-bbbb") == (["MIG-bbbb"], "nvml", "measured by NVML")
    assert chosen("1")[0] == [OTHER]
    for asked in ("0", "all", "MIG-aaaa,MIG-bbbb"):
        with pytest.raises(UsageError, match="MIG") as caught:
            chosen(asked)
        assert "MIG-aaaa" in str(caught.value.hint)
    driver.holds(MIG[0])
    assert chosen("0")[0] == ["MIG-aaaa"], "the only instance is no question"


@pytest.mark.requires("gcc")
@pytest.mark.parametrize(
    ("error", "expected", "told"), [(3, "nvml", "shares the machine's memory"), (999, "log", "logged, not measured")]
)
def test_a_gpu_without_memory_of_its_own_is_measured_by_process(
    driver: FakeDriver, error: int, expected: str, told: str
) -> None:
    """GB10 and Jetson Thor do not support the question; a driver that fails is none of them."""
    driver.holds(f"fail nvmlDeviceGetMemoryInfo {error}")
    _, meter, words = chosen("0")
    assert meter == expected
    assert told in words


@pytest.mark.requires("gcc")
def test_under_wsl_the_user_is_told_what_is_measured(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "on_wsl", lambda: True)
    _, meter, words = chosen("0")
    assert meter == "nvml"
    assert "rise of the whole GPU" in words


class Answers:
    """A daemon that says these things of itself."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._info = info

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def facts(self) -> object:
        return read_daemon("unix:///x", {}, self._info)


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(docker, "has_device", lambda: True)
    monkeypatch.setattr(docker, "_SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    return iter([None])


@pytest.mark.parametrize(
    ("info", "obstacle"),
    [
        ({"Runtimes": {"nvidia": {}}}, None),
        ({"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}, None),
        ({"Runtimes": {"runc": {}}}, "neither the nvidia runtime"),
        ({"OperatingSystem": "Docker Desktop", "Runtimes": {"nvidia": {}}}, "virtual machine"),
    ],
)
@pytest.mark.usefixtures("gpu_here")
def test_the_daemon_is_asked_whether_it_can_hand_out_a_gpu(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], obstacle: str | None
) -> None:
    monkeypatch.setattr(docker_client, "Daemon", lambda **_: Answers(info))
    told = docker_gpu_obstacle()
    assert told is None if obstacle is None else obstacle in str(told)


@pytest.mark.usefixtures("gpu_here")
def test_the_toolkit_s_hook_alone_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docker_client, "Daemon", lambda **_: Answers({"Runtimes": {"runc": {}}}))
    (tmp_path / docker.HOOK).touch(0o755)
    assert docker_gpu_obstacle() is None


@pytest.mark.parametrize(("address", "told"), [("tcp://gpu-box:2375", "gpu-box"), ("unix:///no/such.sock", "/no/such.sock")])
@pytest.mark.usefixtures("gpu_here")
def test_the_daemon_of_the_environment_is_the_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    monkeypatch.setenv("DOCKER_HOST", address)
    assert told in str(docker_gpu_obstacle())


def test_without_a_gpu_no_daemon_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker, "has_device", lambda: False)
    monkeypatch.setattr(docker_client, "Daemon", None)
    assert docker_gpu_obstacle() == "there is no NVIDIA GPU"
