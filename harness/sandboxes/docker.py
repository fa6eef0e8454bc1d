"""Sandbox ``docker``: the engine in a fresh container of a daemon on this machine."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import tarfile
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from harness.errors import BusyError, EngineError, HarnessError, NotFoundError, UnavailableError, UsageError
from harness.ownership import RUN, owner_labels, start_time
from harness.sandboxes.base import SECRETS, ImageFacts, Launch, Site
from harness.sandboxes.cgroup import container_pids, holds
from harness.sandboxes.container_config import check_reference, container_config, repository
from harness.sandboxes.daemon import DaemonFacts, refusal
from harness.sandboxes.docker_client import Daemon, Progress
from harness.sandboxes.forward import Forwarder
from harness.sandboxes.leftovers import sweep
from harness.sandboxes.log_pump import LogPump, hidden_values
from harness.sandboxes.process import check_secret_name, free_port
from harness.sandboxes.reaper import Reaper
from harness.sandboxes.tail import last_lines

#: Where engines listen in their containers.
CONTAINER_PORT: Final = 8080
#: Share of the memory that is available now which an engine may take: the machine has to live on.
MEMORY_SHARE: Final = 0.9
#: How long the last output may take to arrive after a container's end, seconds.
LOG_LIMIT: Final = 30.0

#: Where the last stored line must be found in the attached log, bytes from its end.
NEAR_THE_END: Final = 64 << 10

#: Called with each named step of a start; tests inject faults here.
StepHook = Callable[[str], None]


class DockerSandbox:
    """Starts engines in containers, one at a time.

    ``address`` names the daemon (``DOCKER_HOST``, else the system's). ``progress`` reports an image's pull,
    ``memory_limit`` (bytes, swap included) bounds a container.
    """

    name: Literal["docker"] = "docker"

    def __init__(
        self,
        reaper: Reaper,
        *,
        address: str | None = None,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        hook: StepHook = lambda _: None,
    ) -> None:
        self._reaper = reaper
        self._address = address
        self._progress = progress
        self._memory_limit = memory_limit
        self._hook = hook
        #: What the label ``harness.run`` of its containers says.
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}-{secrets.token_hex(3)}"
        self._daemon: Daemon | None = None
        self._facts: DaemonFacts | None = None
        self._host_port: int | None = None
        self._networks: set[str] = set()
        self._running: DockerEngine | None = None

    def __enter__(self) -> DockerSandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def site(self, port: int | None = None) -> Site:
        """The engine's own port; on this machine it is any free one of 127.0.0.1, or ``port`` if that is free."""
        self._host_port = None if port is None else free_port(port)
        return Site(sandbox="docker", host="0.0.0.0", port=port or CONTAINER_PORT)  # noqa: S104 - in the container

    def start(self, launch: Launch, site: Site, log: Path) -> DockerEngine:
        """Start a container of ``launch.image``, pulling it first if it is not here.

        Raises:
            NotFoundError: no such image, or no engine in it. UnavailableError: no usable daemon, image or GPU.
            NotPermittedError: the daemon's socket may not be used. EngineError: it cannot be started.
        """
        if launch.image is None:
            raise UsageError("sandbox docker needs an image", hint="--image REF")
        reference = check_reference(launch.image)
        daemon, facts = self._connect()
        for mount in launch.mounts:
            if mount.kind == "volume" and mount.read_only and not daemon.has_volume(mount.source):
                raise NotFoundError(f"there is no Docker volume {mount.source}", hint="docker volume ls", code="no-such-volume")
        image = self._image(daemon, reference)
        config = container_config(
            launch,
            image=image["Id"],
            port=site.port,
            network=self._network(daemon, internal=True),
            labels=owner_labels(self.run),
            memory_limit=self._memory_limit or int(_available_memory() * MEMORY_SHARE),
            daemon=facts,
            proxies=os.environ,
        )
        container: str | None = None
        pump: LogPump | None = None
        try:
            self._hook("creating")
            container = daemon.create(config, f"harness-{self.run}-{secrets.token_hex(3)}")
            self._hook("created")
            outside = self._network(daemon, internal=False) if launch.network else None
            if outside is not None:
                daemon.connect(container, outside)
            if launch.secrets:
                daemon.put_archive(container, SECRETS, _archive(launch.secrets, (image["Config"] or {}).get("User", "")))
            pump = LogPump(daemon.attach(container), log, hidden_values(launch, os.environ))
            daemon.start(container)
            self._hook("started")
            engine = DockerEngine(
                daemon, self._reaper, container, site, log, pump, _image_facts(image, reference),
                inside=config["HostConfig"]["NetworkMode"], outside=outside, port=self._host_port,
            )  # fmt: skip
        except BaseException:
            if container is not None:
                with contextlib.suppress(HarnessError):
                    daemon.remove(container)
            if pump is not None:
                pump.close()
            raise
        self._running = engine
        return engine

    def close(self) -> None:
        """End and remove what is left of this sandbox's containers."""
        if self._daemon is None:
            return
        try:
            if self._running is not None:
                self._running.stop()
            for container in self._daemon.containers(f"{RUN}={self.run}"):
                self._daemon.remove(container["Id"])  # one whose start was interrupted
            for network in self._daemon.networks(f"{RUN}={self.run}"):
                self._daemon.remove_network(network["Id"])
            self._reaper.unwatch_containers()
        finally:
            self._daemon.close()
            self._daemon = None
            self._networks.clear()

    def _connect(self) -> tuple[Daemon, DaemonFacts]:
        if self._daemon is None or self._facts is None:
            with contextlib.ExitStack() as undo:
                daemon = undo.enter_context(Daemon(self._address))
                facts = daemon.facts()
                path = _local_socket(daemon, facts)
                self._reaper.start()
                self._reaper.watch_containers(path, f"{RUN}={self.run}")
                sweep(daemon)
                undo.pop_all()
            self._daemon, self._facts = daemon, facts
        return self._daemon, self._facts

    def _network(self, daemon: Daemon, *, internal: bool) -> str:
        """The bridge of this run: ``internal``, or one that leads outside for as long as something is fetched."""
        name = f"harness-{self.run}{'' if internal else '-outside'}"
        if name not in self._networks:
            daemon.create_network(name, owner_labels(self.run), internal=internal)
            self._networks.add(name)
        return name

    def _image(self, daemon: Daemon, reference: str) -> Mapping[str, Any]:
        image = daemon.image(reference) or _built_here(daemon, reference)
        if image is None:
            daemon.pull(reference, self._progress)
            image = daemon.image(reference)
        if image is None:
            raise UnavailableError(f"the image {reference} was pulled, but is not here", code="image-unavailable")
        return image


class DockerEngine:
    """An engine in a container that has just been started.

    Raises:
        UnavailableError: its processes cannot be seen from here (code ``docker-not-local``).
    """

    def __init__(
        self,
        daemon: Daemon,
        reaper: Reaper,
        container: str,
        site: Site,
        log: Path,
        pump: LogPump,
        image: ImageFacts,
        *,
        inside: str,
        outside: str | None,
        port: int | None,
    ) -> None:
        self._daemon = daemon
        self._outside = outside
        self._reaper = reaper
        self._pump = pump
        self._lock = threading.RLock()
        self._status: int | None = None
        self._out_of_memory = False
        self._removed = False
        self.container = container
        self.log = log
        self.image: ImageFacts | None = image
        attributes = self._inspect()
        self._first = int(attributes["State"]["Pid"])
        self._first_start = start_time(self._first) if self._first else None
        address = attributes["NetworkSettings"]["Networks"][inside]["IPAddress"]
        try:  # a container that ended at once has no address left, and is not reachable
            self._forwarder = Forwarder(port, (address or "127.0.0.1", site.port if address else 1))
        except OSError as error:
            raise BusyError(f"port {port} of 127.0.0.1 is taken", hint="choose another port, or none") from error
        self.endpoint = f"http://127.0.0.1:{self._forwarder.port}"
        self._prove_local()

    def pids(self) -> frozenset[int]:
        """Host PIDs of everything in the container. Empty once it has ended."""
        return container_pids(self._first, self.container) if self._first_lives() else frozenset()

    def end_network(self) -> None:
        """Take the container off the network that leads outside.

        Raises:
            UnavailableError: the daemon is gone.
        """
        with self._lock:
            if self._outside is not None and not self._removed:
                self._daemon.disconnect(self.container, self._outside)
                self._outside = None

    def exit_status(self) -> int | None:
        """The exit status (128 + signal for a killed one); ``None`` while it runs.

        Raises:
            EngineError: it was OOM-killed (code ``out-of-memory``), removed externally, or the reaper died
                (``supervision-lost``): the container has been ended. UnavailableError: the daemon is gone.
        """
        with self._lock:
            if self._status is None:
                self._check_guard()
            # An engine outlives its daemon, but no log of it arrives then.
            if self._status is None and (self._pump.ended() or not self._first_lives()):
                self._learn_end(self._inspect()["State"])
            if self._out_of_memory:
                raise EngineError(
                    "the engine needed more memory than its container may have, and was killed",
                    tail=last_lines(self.log),
                    hint="close other programs, or choose a smaller context",
                    code="out-of-memory",
                )
            return self._status

    def stop(self, timeout: float = 10.0) -> None:
        """End the container and remove it; harmless when it has ended already. The log is complete afterwards.

        Raises:
            UnavailableError: the daemon is gone; the next start removes what comes back with it.
        """
        with self._lock:
            if self._removed:
                return
            try:
                self._daemon.stop(self.container, timeout)
                attributes = self._daemon.inspect(self.container)
                if attributes is not None:
                    self._learn_end(attributes["State"])
                    if not (self._pump.finish(LOG_LIMIT) and self._ends_like_the_stored_log()):
                        self._daemon.save_log(self.container, self.log, self._pump.start)
                        self._pump.scrub()
                    self._daemon.remove(self.container)
            finally:
                self._pump.close()
                self._forwarder.close()
            self._removed = True

    def _prove_local(self) -> None:
        """The container's processes must be processes of this machine, seen from here."""
        if holds(self._first, self.container) or not self._inspect()["State"]["Running"]:
            return
        raise UnavailableError(
            "the container's processes are not visible here, so their memory cannot be measured",
            hint="run harness on the daemon's machine; in a container it needs pid: host",
            code="docker-not-local",
        )

    def _check_guard(self) -> None:
        """Without its guard an engine might outlive us: it is ended."""
        try:
            self._reaper.check()
        except EngineError:
            with contextlib.suppress(HarnessError):
                self.stop(0)
            raise

    def _first_lives(self) -> bool:
        """Whether the container's first process runs: cheaper than asking the daemon."""
        return self._first_start is not None and start_time(self._first) == self._first_start

    def _inspect(self) -> Mapping[str, Any]:
        attributes = self._daemon.inspect(self.container)
        if attributes is None:
            raise EngineError("the engine's container was removed externally", code="container-gone")
        return attributes

    def _learn_end(self, state: Mapping[str, Any]) -> None:
        if not state["Running"]:
            self._status = int(state["ExitCode"])
            self._out_of_memory = bool(state["OOMKilled"])

    def _ends_like_the_stored_log(self) -> bool:
        """A check on the attached stream: when the daemon goes away its end looks like the engine's.

        Near the end is enough: the two streams of an engine may come in another order.
        """
        stored = self._daemon.last_line(self.container)
        with self.log.open("rb") as file:
            file.seek(max(self._pump.start, self.log.stat().st_size - len(stored) - NEAR_THE_END))
            ours = file.read()
        return _as_stored(stored) in _as_stored(ours)


def _local_socket(daemon: Daemon, facts: DaemonFacts) -> str:
    """The path of the socket of a daemon that engines can be measured with."""
    refused = refusal(facts)
    if refused is not None:
        raise refused
    return daemon.socket_path


def _image_facts(image: Mapping[str, Any], reference: str) -> ImageFacts:
    """The repository's digest where a registry knows the image under this name, else the image's own id."""
    digests = [one.partition("@") for one in image.get("RepoDigests") or []]
    matching = [digest for name, _, digest in digests if name == repository(reference)]
    config = image.get("Config") or {}
    command = tuple(config.get("Entrypoint") or config.get("Cmd") or ())
    return ImageFacts(reference=reference, digest=next(iter(matching), str(image["Id"])), command=command)


def _built_here(daemon: Daemon, reference: str) -> Mapping[str, Any] | None:
    """An image of that repository that no registry has, by its own id: what a record has in a digest's place."""
    _, _, digest = reference.partition("@")
    image = daemon.image(digest) if digest else None
    names = [repository(name) for name in (image or {}).get("RepoTags") or []]
    return image if repository(reference) in names else None


def _archive(contents: Mapping[str, str], user: str) -> bytes:
    """A tar of files of mode 0400 that belong to the image's user (a named one is root's equal here: unknown)."""
    owner, _, group = user.partition(":")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in contents.items():
            check_secret_name(name)
            data = content.encode()
            member = tarfile.TarInfo(name)
            member.mode, member.size = 0o400, len(data)
            member.uid = int(owner) if owner.isdecimal() else 0
            member.gid = int(group) if group.isdecimal() else 0
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _as_stored(data: bytes) -> str:
    """Bytes that are no UTF-8 are replaced in the daemon's store."""
    return data.decode("utf-8", "replace").rstrip("\n")


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def local_image(reference: str) -> ImageFacts | None:
    """What a reference means on this machine, without pulling; ``None`` where the image is not here.

    Raises:
        UsageError: no reference. UnavailableError, NotPermittedError: no daemon that may be asked.
    """
    with Daemon() as daemon:
        image = daemon.image(check_reference(reference))
    return None if image is None else _image_facts(image, reference)
