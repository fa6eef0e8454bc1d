"""An engine in a container: reached from this machine alone, and without a network of its own once its model is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from harness.sandboxes.docker import DockerEngine
from harness.sandboxes.docker_client import Daemon
from tests.support.places import PROGRAM, DockerPlace
from tests.support.waiting import until

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.requires("docker")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[DockerPlace]:
    with DockerPlace(tmp_path).opened() as opened:
        yield opened


@pytest.fixture
def client() -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.from_env()) as opened:
        yield opened


@pytest.fixture
def outside() -> Iterator[tuple[str, int]]:
    """A server in a network namespace that this machine routes to: the world outside."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the program ip, to make a machine outside")
    name = f"hrns{os.getpid() % 10_000}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    inside = ["netns", "exec", name, "ip"]
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", "198.51.100.1/30", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip(*inside, "addr", "add", "198.51.100.2/30", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        program = ["ip", "netns", "exec", name, sys.executable, str(PROGRAM), "serve", "198.51.100.2", "80"]
        with subprocess.Popen(program, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield "198.51.100.2", 80
            server.kill()
    finally:
        ip("netns", "delete", name)


def served(place: DockerPlace) -> tuple[DockerEngine, str]:
    """An engine that answers at its endpoint, and the address of its container."""
    site = place.sandbox.site()
    running = place.sandbox.start(place.launch("serve", site.host, str(site.port)), site, place.folder / "log")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        with contextlib.suppress(OSError), opener.open(running.endpoint, timeout=5) as answer:
            return bool(answer.read())
        return False

    until(answers, "an answer at the endpoint")
    with Daemon() as daemon:
        attributes = daemon.inspect(running.container)
    assert attributes is not None
    (network,) = attributes["NetworkSettings"]["Networks"].values()
    return running, network["IPAddress"]


@pytest.mark.parametrize("own_network", [False, True])
def test_no_other_container_reaches_the_engine(place: DockerPlace, client: DockerClient, own_network: bool) -> None:
    _, address = served(place)
    network = client.networks.create(f"harness-test-{place.mark}") if own_network else None
    other = client.containers.run(
        place.image, ["reach", address, "8080"], detach=True, network=network.name if network is not None else "bridge"
    )
    try:
        until(lambda: other.logs() != b"", "what the other container finds")
        assert other.logs() == b"out of reach\n"
    finally:
        other.remove(force=True)
        if network is not None:
            network.remove()


def test_an_engine_with_a_local_model_reaches_nothing(place: DockerPlace, outside: tuple[str, int]) -> None:
    running = place.start("reach", outside[0], str(outside[1]))
    until(lambda: running.log.read_text() != "", "what the engine finds")
    assert running.log.read_text() == "out of reach\n"


def test_the_network_of_a_pull_ends_with_it(place: DockerPlace, outside: tuple[str, int]) -> None:
    launch = msgspec.structs.replace(place.launch("reach", outside[0], str(outside[1])), network=True)
    running = place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")
    until(lambda: running.log.read_text() == "reached\n", "the outside")
    running.end_network()
    until(lambda: running.log.read_text() == "reached\nout of reach\n", "the end of the outside")
    running.end_network()


def test_the_networks_go_with_the_run(place: DockerPlace) -> None:
    launch = msgspec.structs.replace(place.launch("sleep"), network=True)
    place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")
    label = f"harness.run={place.sandbox.run}"
    with Daemon() as daemon:
        assert len(daemon.networks(label)) == 2
        place.sandbox.close()
        assert daemon.networks(label) == []
