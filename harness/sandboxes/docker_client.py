"""A Docker daemon as the sandbox needs it, with errors that say what to do. The only importer of the Docker SDK."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from harness.errors import UnavailableError
from harness.sandboxes.daemon import DaemonFacts, read_daemon, remote_refusal
from harness.sandboxes.docker_deadline import mount, ping
from harness.sandboxes.docker_errors import connection_error, daemon_error, image_error, silent_error
from harness.sandboxes.reaper_main import TimedSocket

if TYPE_CHECKING:
    from docker import APIClient

#: How long the daemon may take over one answer, from question to last byte, seconds (it may be busy unpacking an image).
ANSWER_LIMIT: Final = 120
#: How long it may take to say that it is there, and how long one that does not is not asked again, seconds.
PROBE_LIMIT: Final = 5.0
_SILENCE: Final = 60.0
_silent: dict[str, float] = {}
#: The API of Docker 20.10, spoken to a daemon that does not say its own.
_API: Final = "1.41"
DEFAULT_ADDRESS: Final = "unix:///var/run/docker.sock"

#: The head of an HTTP answer is shorter, bytes.
_LONGEST_HEAD: Final = 64 << 10

#: Reports progress of a pull: what, bytes done, bytes in total (``None``: not known).
Progress = Callable[[str, float, float | None], None]


class Daemon:
    """A connection to the daemon at ``address``; by default what ``DOCKER_HOST`` names, else the system's.

    ``limit`` is how long it may take over one answer, seconds.

    Everything may raise UnavailableError when the daemon goes away (``docker-gone``) or refuses.

    Raises:
        UnavailableError: no daemon answers, or it is on another machine. NotPermittedError: its socket may not be used.
    """

    def __init__(self, address: str | None = None, limit: int = ANSWER_LIMIT) -> None:
        self.address = address or os.environ.get("DOCKER_HOST") or DEFAULT_ADDRESS
        if (remote := remote_refusal(self.address)) is not None:
            raise remote
        self._limit = limit
        self._until = threading.local()  # several threads ask at once
        self._api = self._connect()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def socket_path(self) -> str:
        """The path of its Unix socket."""
        return self.address.removeprefix("unix://")

    def close(self) -> None:
        """Give the connection back."""
        self._api.close()

    def facts(self) -> DaemonFacts:
        """What the daemon says of itself."""
        with self._talk("ask the daemon what it is"):
            return read_daemon(self.address, self._api.version(), self._api.info())

    def image(self, reference: str) -> Mapping[str, Any] | None:
        """What ``docker image inspect`` says; ``None`` where the image is not here."""
        return self._look("image", lambda: self._api.inspect_image(reference))  # type: ignore[no-untyped-call]

    def pull(self, reference: str, progress: Progress | None = None) -> None:
        """Pull an image.

        Raises:
            NotFoundError: there is no such image. UnavailableError: its registry cannot be reached.
        """
        import docker.errors

        layers: dict[str, tuple[int, int]] = {}
        try:
            self._go_on()
            for event in self._api.pull(reference, stream=True, decode=True):
                self._go_on()
                if "error" in event:
                    raise image_error(event["error"], reference)
                detail = event.get("progressDetail") or {}
                if progress is not None and event.get("status") == "Downloading" and detail.get("total"):
                    layers[event["id"]] = (detail["current"], detail["total"])
                    done, total = (sum(column) for column in zip(*layers.values(), strict=True))
                    progress(f"pull {reference}", done, total)
        except (docker.errors.DockerException, OSError) as error:
            if time.monotonic() >= self._until.at:
                raise silent_error(self.address, self._limit, f"pull {reference}") from error
            raise image_error(_text(error), reference) from error

    def create(self, config: Mapping[str, Any], name: str) -> str:
        """Create a container from the Engine API's configuration; its id."""
        with self._talk("create the container"):
            created = self._api.create_container_from_config(config, name)  # type: ignore[no-untyped-call]
        return str(created["Id"])

    def put_archive(self, container: str, folder: str, archive: bytes) -> None:
        """Unpack a tar in a container."""
        with self._talk("write into the container"):
            self._api.put_archive(container, folder, archive)

    def attach(self, container: str) -> socket.socket:
        """A connection that carries the container's output from now on, without a timeout.

        Made by hand (Engine API, ``POST /containers/ID/attach``): the SDK's own hides how a stream ended, times out
        when an engine is silent, and cannot be closed.
        """
        until = time.monotonic() + self._limit
        link = TimedSocket(lambda: until)
        try:
            with self._talk("attach to the container"):
                link.connect(self.socket_path)
                target = f"/containers/{container}/attach?stream=1&stdout=1&stderr=1"
                headers = "Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n"
                link.sendall(f"POST {target} HTTP/1.1\r\n{headers}\r\n".encode())
                _take_upgrade(link)
                until = math.inf
                link.settimeout(None)
        except BaseException:
            link.close()
            raise
        return link

    def start(self, container: str) -> None:
        """Start a container."""
        with self._talk("start the container"):
            self._api.start(container)

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """What ``docker inspect`` says; ``None`` where the container is no more."""
        return self._look("container", lambda: self._api.inspect_container(container))

    def stop(self, container: str, timeout: float) -> None:
        """Ask a container to end, after ``timeout`` seconds by force; harmless where it has ended."""
        with self._talk("stop the container", absent_is_fine=True, extra=timeout):
            self._api.stop(container, timeout=max(0, round(timeout)))

    def remove(self, container: str) -> None:
        """Remove a container and its nameless volumes, running or not; harmless where another process does the same."""
        with self._talk("remove the container", absent_is_fine=True):
            self._api.remove_container(container, force=True, v=True)

    def volume_folder(self, name: str) -> str | None:
        """The folder behind a local volume, as the daemon names it; ``None`` where there is no such volume."""
        found = self._look("volume", lambda: self._api.inspect_volume(name))
        return found.get("Mountpoint") if found is not None and found.get("Driver") == "local" else None

    def remove_volume(self, name: str) -> None:
        """Remove a volume that no container uses."""
        with self._talk("remove the volume", absent_is_fine=True):
            self._api.remove_volume(name)

    def last_line(self, container: str) -> bytes:
        """The last line of the stored log."""
        with self._talk("read the container's log"):
            return bytes(self._api.logs(container, tail=1))

    def save_log(self, container: str, path: Path, start: int) -> None:
        """Write the whole stored log to ``path``, from byte ``start`` on."""
        with self._talk("read the container's log"), path.open("r+b") as file:
            file.truncate(start)
            file.seek(start)
            for chunk in self._api.logs(container, stream=True, follow=False):
                self._go_on()
                file.write(chunk)

    def has_volume(self, name: str) -> bool:
        """Whether there is a volume of that name."""
        with self._talk("list volumes"):
            listed = self._api.volumes(filters={"name": name}).get("Volumes") or []
        return any(one["Name"] == name for one in listed)  # the filter takes parts of names

    def create_network(self, name: str, labels: Mapping[str, str], *, internal: bool) -> None:
        """Make a bridge; an ``internal`` one leads nowhere but to this machine."""
        options = {"com.docker.network.bridge.enable_icc": "false"}
        with self._talk("make a network"):
            self._api.create_network(name, driver="bridge", internal=internal, labels=dict(labels), options=options)

    def connect(self, container: str, network: str) -> None:
        """Put a container on a further network."""
        with self._talk("connect the container to a network"):
            self._api.connect_container_to_network(container, network)

    def disconnect(self, container: str, network: str) -> None:
        """Take a container off a network; harmless where it has ended."""
        with self._talk("take the container off a network", absent_is_fine=True):
            self._api.disconnect_container_from_network(container, network, force=True)

    def remove_network(self, name: str) -> None:
        """Remove a network that no container uses."""
        with self._talk("remove the network", absent_is_fine=True):
            self._api.remove_network(name)

    def networks(self, label: str) -> list[dict[str, Any]]:
        """Networks that bear ``label``, as ``docker network ls`` lists them."""
        with self._talk("list networks"):
            return list(self._api.networks(filters={"label": [label]}))

    def containers(self, label: str) -> list[dict[str, Any]]:
        """Containers in any state that bear ``label`` (``key=value``), as ``docker ps`` lists them."""
        with self._talk("list containers"):
            return list(self._api.containers(all=True, filters={"label": [label]}))

    def volumes(self, label: str) -> list[dict[str, Any]]:
        """Volumes that bear ``label``, as ``docker volume ls`` lists them."""
        with self._talk("list volumes"):
            return list(self._api.volumes(filters={"label": [label]}).get("Volumes") or [])

    def _connect(self) -> APIClient:
        import docker
        import docker.errors

        version = self._probe()
        try:
            api = docker.APIClient(base_url=self.address, timeout=self._limit, version=version)
        except (docker.errors.DockerException, OSError, ValueError) as error:
            raise connection_error(str(error), self.address) from error
        mount(api, self.socket_path, lambda: getattr(self._until, "at", time.monotonic() + self._limit))
        return api

    def _probe(self) -> str:
        """Whether the daemon answers at all, before anything long is begun; the version of its API."""
        if time.monotonic() < _silent.get(self.address, 0.0):
            raise silent_error(self.address, PROBE_LIMIT)
        try:
            return ping(self.socket_path, time.monotonic() + PROBE_LIMIT) or _API
        except TimeoutError as error:
            _silent[self.address] = time.monotonic() + _SILENCE
            raise silent_error(self.address, PROBE_LIMIT) from error
        except (OSError, HTTPException) as error:
            raise connection_error(str(error), self.address) from error

    @contextlib.contextmanager
    def _talk(self, doing: str, *, absent_is_fine: bool = False, extra: float = 0.0) -> Iterator[None]:
        """A talk that ends in time (``extra`` seconds are what the daemon is asked to wait), with the SDK's errors as ours."""
        import docker.errors

        limit = self._limit + extra
        self._until.at = time.monotonic() + limit
        try:
            yield
        except docker.errors.APIError as error:
            # 409: a removal is in progress already.
            if not (absent_is_fine and error.status_code in (404, 409)):
                raise daemon_error(_text(error), doing) from error
        except (docker.errors.DockerException, OSError) as error:  # errors of requests are OSErrors
            if time.monotonic() >= self._until.at:
                raise silent_error(self.address, limit, doing) from error
            raise UnavailableError(
                f"cannot {doing}: the connection to the Docker daemon was lost", hint="is it running?", code="docker-gone"
            ) from error

    def _look(self, what: str, ask: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """What the daemon says of a thing; ``None`` where there is no such thing."""
        import docker.errors

        try:
            with self._talk(f"look at the {what}"):
                return ask()
        except UnavailableError as error:
            if isinstance(error.__cause__, docker.errors.NotFound):
                return None
            raise

    def _go_on(self) -> None:
        """The daemon has said something whole: it has its time again for what comes next."""
        self._until.at = time.monotonic() + self._limit


def _take_upgrade(link: socket.socket) -> None:
    """Read the head of the answer, byte by byte: what follows its empty line belongs to the container."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = bytearray(1)
        if not link.recv_into(byte) or len(head) > _LONGEST_HEAD:
            raise ConnectionError("the daemon closed the connection, or gave an invalid answer")
        head += byte
    if head.split(maxsplit=2)[1] not in (b"101", b"200"):
        raise daemon_error(head.decode("latin-1"), "attach to the container")


def _text(error: BaseException) -> str:
    return str(getattr(error, "explanation", None) or error)
