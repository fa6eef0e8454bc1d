"""GPUs of containers and the end of a daemon, on a second daemon of the test's own (``HARNESS_CI_DOCKERD=1``)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from harness.errors import UnavailableError
from harness.sandboxes.base import GpuRequest
from harness.sandboxes.docker_client import Daemon
from tests.support.gpu_daemon import GpuDaemon
from tests.support.images import python_image
from tests.support.places import DockerPlace
from tests.support.waiting import alive, until

pytestmark = pytest.mark.requires("ci-dockerd")


@pytest.fixture(scope="module")
def gpu_daemon() -> Iterator[GpuDaemon]:
    with GpuDaemon() as daemon:
        add_image(daemon)
        yield daemon


def add_image(daemon: GpuDaemon) -> None:
    import docker

    with contextlib.closing(docker.DockerClient(base_url=daemon.address)) as client:
        python_image(client)


def environment(pid: int) -> dict[str, str]:
    items = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(item.split("=", 1) for item in items if "=" in item)


@pytest.mark.parametrize(("gpus", "visible"), [("all", "all"), ("GPU-aaaa", "GPU-aaaa"), ("0,1", "0,1"), ("none", "void")])
def test_a_container_sees_the_gpus_asked_for(gpu_daemon: GpuDaemon, tmp_path: Path, gpus: str, visible: str) -> None:
    """The request is accepted, and the toolkit's variable in the container names these GPUs and no others."""
    with DockerPlace(tmp_path, address=gpu_daemon.address).opened() as place:
        launch = msgspec.structs.replace(place.launch("serve", "127.0.0.1", "8080"), gpus=GpuRequest.parse(gpus))

        running = place.sandbox.start(launch, place.sandbox.site(), tmp_path / "log")
        until(lambda: running.log.read_bytes() == b"ready\n", "the engine, past its exec")

        seen = {environment(pid).get("NVIDIA_VISIBLE_DEVICES") for pid in running.pids()}
        assert seen == {visible}


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # the SDK's own, where it cannot connect
def test_a_daemon_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """The run ends with 69 and hangs nowhere; the container that outlived the daemon goes when the daemon is back."""
    with GpuDaemon() as daemon:
        add_image(daemon)
        place = DockerPlace(tmp_path, address=daemon.address)
        with place.reaper:
            running = place.start("sleep")
            pids = running.pids()
            daemon.kill()

            with pytest.raises(UnavailableError) as caught:
                running.stop()
            assert caught.value.code == "docker-gone"
        with contextlib.suppress(UnavailableError):
            place.sandbox.close()
        del caught
        gc.collect()

        daemon.start()
        with Daemon(daemon.address) as back:
            until(lambda: not back.containers("harness=1"), "the end of the container, by the reaper that waited")
            until(lambda: not any(alive(pid) for pid in pids), "the end of its processes")
