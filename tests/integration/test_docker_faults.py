"""Everything that goes wrong with containers, tried on a real daemon, which itself is never touched."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from harness.errors import (
    BusyError,
    EngineError,
    HarnessError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UsageError,
)
from harness.sandboxes.base import GpuRequest, Mount, Running
from harness.sandboxes.docker import DockerSandbox
from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.leftovers import leftovers, remove, sweep
from harness.sandboxes.process import free_port
from harness.sandboxes.reaper import Reaper
from tests.support.places import DockerPlace, engine_image, marked_processes
from tests.support.proxy import Proxy
from tests.support.victim import Victim, kill_three_at
from tests.support.waiting import alive, until

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.requires("docker")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[DockerPlace]:
    with DockerPlace(tmp_path).opened() as opened:
        yield opened


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as opened:
        yield opened


@pytest.fixture
def client() -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.from_env()) as opened:
        yield opened


def ended(running: Running) -> bool:
    return running.exit_status() is not None


def says(running: Running, text: str) -> bool:
    return text in running.log.read_text()


def test_no_daemon(tmp_path: Path) -> None:
    with Reaper() as reaper, DockerSandbox(reaper, address=f"unix://{tmp_path}/no.sock") as sandbox:
        launch = DockerPlace(tmp_path).launch("sleep")
        with pytest.raises(UnavailableError) as caught:
            sandbox.start(launch, sandbox.site(), tmp_path / "log")

    assert caught.value.code == "docker-absent"


def test_a_daemon_that_one_may_not_use(tmp_path: Path) -> None:
    """An ordinary user outside the group docker gets 77 and is told about the group."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with contextlib.suppress(HarnessError):
        Daemon(f"unix://{tmp_path}/no.sock")  # the modules are imported before the child loses the right to read them
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            Daemon()
        except NotPermittedError as error:
            os._exit(0 if "group docker" in str(error.hint) else 1)
        finally:
            os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "ssh://gpu-box"])
def test_a_daemon_elsewhere_is_refused_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    launch = DockerPlace(tmp_path).launch("sleep")
    monkeypatch.setenv("DOCKER_HOST", address)
    with Reaper() as reaper, DockerSandbox(reaper) as sandbox, pytest.raises(UnavailableError) as caught:
        sandbox.start(launch, sandbox.site(), tmp_path / "log")

    assert caught.value.code == "docker-remote"


def test_an_image_that_cannot_be_pulled(place: DockerPlace) -> None:
    """The registry does not answer: 69, quickly, with the image's name."""
    launch = msgspec.structs.replace(place.launch("sleep"), image="localhost:1/no/such:image")

    with pytest.raises(UnavailableError, match="localhost:1/no/such:image") as caught:
        place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")

    assert caught.value.code == "image-unavailable"


@pytest.mark.parametrize("image", ["-rm", "a b", "$(touch /tmp/x)", "../../etc", "a\nb"])
def test_a_hostile_image_name_is_not_even_asked_for(place: DockerPlace, image: str) -> None:
    launch = msgspec.structs.replace(place.launch("sleep"), image=image)

    with pytest.raises(UsageError):
        place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")


def test_a_gpu_where_there_is_no_runtime_for_it(place: DockerPlace, daemon: Daemon) -> None:
    """The container that could not be started does not stay."""
    if daemon.facts().gpu_path is not None:
        pytest.skip("this daemon can give a container a GPU")
    launch = msgspec.structs.replace(place.launch("sleep"), gpus=GpuRequest(mode="all"))

    with pytest.raises(UnavailableError) as caught:
        place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")

    assert caught.value.code == "gpu-runtime-missing"
    assert place.leftovers() == []


def test_an_engine_that_needs_too_much_memory(tmp_path: Path) -> None:
    with DockerPlace(tmp_path, memory_limit=64 << 20).opened() as place:
        running = place.start("hold", str(512 << 20))

        with pytest.raises(EngineError) as caught:
            until(lambda: ended(running), "the end")

        assert caught.value.code == "out-of-memory"
        assert caught.value.exit_code == 70
        running.stop()
        assert place.leftovers() == []


def test_somebody_removes_the_container(place: DockerPlace, client: DockerClient) -> None:
    running = place.start("sleep")
    assert running.exit_status() is None

    client.containers.list(ignore_removed=True, filters={"label": f"harness.run={place.sandbox.run}"})[0].remove(force=True)

    with pytest.raises(EngineError) as caught:
        until(lambda: ended(running), "the end")
    assert caught.value.code == "container-gone"
    running.stop()


def test_a_port_of_ones_own(place: DockerPlace) -> None:
    """The port asked for is the port used, and a taken one is refused before anything starts."""
    free = free_port()
    site = place.sandbox.site(free)
    running = place.start("serve", site.host, str(site.port), site=site)

    assert running.endpoint == f"http://127.0.0.1:{free}"
    with pytest.raises(BusyError):
        place.sandbox.site(free)


def test_a_mount_that_does_not_exist_is_not_created(place: DockerPlace) -> None:
    missing = place.folder / "missing"
    mount = Mount(kind="bind", source=str(missing), target="/models")
    launch = msgspec.structs.replace(place.launch("sleep"), mounts=(mount,))

    with pytest.raises(NotFoundError):
        place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")

    assert not missing.exists()


@pytest.mark.parametrize("name", ["a b", "a:b,c", "q'\"$(x)`", "é\n", "--rm", "a=b;ro"])
def test_a_hostile_file_name_is_just_a_name(place: DockerPlace, name: str) -> None:
    path = place.folder / name
    path.write_text("weights")
    target, mounts = place.sandbox.site().place(path)
    launch = msgspec.structs.replace(place.launch("read", target), mounts=mounts)
    running = place.sandbox.start(launch, place.sandbox.site(), place.folder / "log")

    until(lambda: ended(running), "the end")
    running.stop()

    assert running.log.read_text() == "weights\n"


def test_a_log_of_200_megabytes(place: DockerPlace) -> None:
    """Nothing is missing, although the daemon keeps only the end of it."""
    running = place.start("flood", "200")
    until(lambda: ended(running), "the end", limit=240)
    running.stop()

    assert running.log.stat().st_size == 200 << 20
    with running.log.open("rb") as lines:
        assert all(int(line[:8]) == number for number, line in enumerate(lines))


def test_a_cut_stream_is_read_again(place: DockerPlace) -> None:
    """When the connection that carries the log breaks, the daemon's own copy replaces what had arrived."""
    log = place.folder / "engine.log"
    log.write_text("of an earlier engine\n")
    running = place.start("family")
    until(lambda: says(running, "grandchild up") and says(running, "detached up"), "the family")
    running._pump.close()  # type: ignore[attr-defined]
    with log.open("r+") as file:
        file.truncate(25)  # as if it had broken earlier

    running.stop()

    lines = log.read_text().splitlines()
    assert lines[0] == "of an earlier engine"
    assert sorted(lines[1:]) == ["detached up", "grandchild up"]


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # the SDK's own, where it cannot connect
def test_a_daemon_that_goes_away_mid_run(tmp_path: Path, daemon: Daemon) -> None:
    """The run ends with 69, nothing hangs, and once the daemon answers again nothing is left."""
    with Proxy(tmp_path / "proxy.sock", daemon.socket_path) as proxy:
        place = DockerPlace(tmp_path, address=proxy.address)
        with place.reaper:
            running = place.start("sleep")
            pids = running.pids()
            proxy.cut()

            with pytest.raises(UnavailableError) as caught:
                running.stop()
            assert caught.value.code == "docker-gone"
            assert alive(min(pids)), "no daemon: nobody could end it"
    with contextlib.suppress(UnavailableError):
        place.sandbox.close()
    del caught
    gc.collect()

    # Its owner, this process, lives: it is not abandoned, and the sweep keeps its hands off.
    sweep(daemon)
    left = [one for one in leftovers(daemon) if one.run == place.sandbox.run]
    assert {(one.kind, one.state) for one in left} == {("container", "in-use"), ("network", "in-use")}

    for one in left:
        remove(daemon, one)
    assert not alive(min(pids))


@pytest.mark.parametrize("stage", ["creating", "created", "started"])
def test_a_death_inside_a_start_leaves_nothing(place: DockerPlace, tmp_path: Path, stage: str) -> None:
    """A kill -9 between the requests of a start, or with one under way."""
    kill_three_at(stage, place, tmp_path)


def test_the_next_start_removes_what_a_killed_reaper_could_not(place: DockerPlace, tmp_path: Path) -> None:
    """Harness and its reaper both killed: the container lives on, until the next harness starts anything."""
    with Victim("docker", tmp_path, mark=place.mark) as victim:
        said = victim.wait_for_stage("running")
        os.kill(said["reaper"], signal.SIGSTOP)  # it must not see its owner's end before its own
        victim.die(signal.SIGKILL)
        os.kill(said["reaper"], signal.SIGKILL)
        until(lambda: not alive(said["reaper"]), "the end of the reaper")
        assert marked_processes(place.mark)

    place.start("leave", "0").stop()

    assert place.leftovers() == []


def test_what_is_not_ours_is_never_touched(client: DockerClient, daemon: Daemon) -> None:
    """A container and a volume without our label survive every sweep and appear in no list."""
    container = client.containers.create(engine_image(), ["sleep"], labels={"harness.run": "x", "harness.deadline": "1"})
    volume = client.volumes.create(labels={"harness": "0", "harness.deadline": "1"})
    try:
        sweep(daemon)

        container.reload()
        volume.reload()
        assert not {container.id, volume.id} & {one.id for one in leftovers(daemon)}
    finally:
        container.remove()
        volume.remove()


def test_a_volume_of_models_is_kept(client: DockerClient, daemon: Daemon, place: DockerPlace) -> None:
    """The volume that a run creates for models is listed, and no sweep removes it."""
    name = f"harness-test-{place.mark}"
    mount = Mount(kind="volume", source=name, target="/models", read_only=False)
    launch = msgspec.structs.replace(place.launch("leave", "0"), mounts=(mount,))
    try:
        place.sandbox.start(launch, place.sandbox.site(), place.folder / "log").stop()
        sweep(daemon)

        [left] = [one for one in leftovers(daemon) if one.name == name]
        assert left.state == "kept"
    finally:
        client.volumes.get(name).remove()


def test_a_container_is_confined(place: DockerPlace) -> None:
    """Seen from outside: no capability, no new privileges, a system-call filter."""
    running = place.start("sleep")
    for pid in running.pids():
        status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


def test_a_reaper_that_is_killed_beside_a_container_is_noticed(place: DockerPlace) -> None:
    """Nothing would end the engine after us: it is ended now, and the run is void."""
    running = place.start("sleep")
    assert place.reaper.pid is not None
    os.kill(place.reaper.pid, signal.SIGKILL)

    def noticed() -> bool:
        try:
            running.exit_status()
        except EngineError as error:
            return error.code == "supervision-lost"
        return False

    until(noticed, "the end of the guard")
    assert place.leftovers() == []
