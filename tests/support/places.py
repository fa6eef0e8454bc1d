"""The sandboxes under contract, each with a way to start the test engine in it and to look for leftovers."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from harness.ownership import LABEL
from harness.sandboxes.base import GpuRequest, Launch, Running, Sandbox, SandboxName, Site
from harness.sandboxes.docker import DockerSandbox, StepHook
from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.process import ProcessSandbox
from harness.sandboxes.reaper import Reaper
from tests.support.images import python_image

#: Fixtures ``NAME_place``, one per sandbox.
PLACES = [pytest.param("process"), pytest.param("docker", marks=pytest.mark.requires("docker"))]
PROGRAM = Path(__file__).with_name("engine_program.py")
#: The variable that marks what a test started.
MARK = "HARNESS_TEST_MARK"


class Place(Protocol):
    name: SandboxName
    mark: str
    reaper: Reaper

    @property
    def sandbox(self) -> Sandbox:
        """Where it starts them."""

    def opened(self) -> contextlib.AbstractContextManager[object]:
        """Ends the sandbox afterwards."""

    def start(
        self,
        *scenario: str,
        site: Site | None = None,
        env: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
        log: str = "engine.log",
    ) -> Running:
        """Start a scenario of the test engine."""

    def leftovers(self) -> list[str]:
        """What of this place's engines still exists."""


class ProcessPlace:
    name: SandboxName = "process"

    def __init__(self, folder: Path, mark: str | None = None) -> None:
        self.folder = folder
        self.mark = mark or uuid.uuid4().hex
        self.reaper = Reaper()
        self.sandbox = ProcessSandbox(self.reaper)

    @contextlib.contextmanager
    def opened(self) -> Iterator[ProcessPlace]:
        with self.reaper, self.sandbox:
            yield self

    def start(
        self,
        *scenario: str,
        site: Site | None = None,
        env: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
        log: str = "engine.log",
    ) -> Running:
        launch = Launch(
            argv=(sys.executable, str(PROGRAM), *scenario), env={MARK: self.mark, **(env or {})}, secrets=secrets or {}
        )
        return self.sandbox.start(launch, site or self.sandbox.site(), self.folder / log)

    def leftovers(self) -> list[str]:
        return marked_processes(self.mark)


class DockerPlace:
    name: SandboxName = "docker"

    def __init__(
        self,
        folder: Path,
        mark: str | None = None,
        hook: StepHook = lambda _: None,
        *,
        address: str | None = None,
        memory_limit: int = 256 << 20,
    ) -> None:
        self.folder = folder
        self.mark = mark or uuid.uuid4().hex
        self.reaper = Reaper()
        self.sandbox = DockerSandbox(self.reaper, address=address, memory_limit=memory_limit, hook=hook)
        self.image = engine_image()

    @contextlib.contextmanager
    def opened(self) -> Iterator[DockerPlace]:
        with self.reaper, self.sandbox:
            yield self

    def start(
        self,
        *scenario: str,
        site: Site | None = None,
        env: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
        log: str = "engine.log",
    ) -> Running:
        launch = self.launch(*scenario, env=env, secrets=secrets)
        return self.sandbox.start(launch, site or self.sandbox.site(), self.folder / log)

    def launch(self, *scenario: str, env: dict[str, str] | None = None, secrets: dict[str, str] | None = None) -> Launch:
        return Launch(
            argv=scenario,
            image=self.image,
            gpus=GpuRequest(mode="none"),
            env={MARK: self.mark, **(env or {})},
            secrets=secrets or {},
        )

    def leftovers(self) -> list[str]:
        with Daemon() as daemon:
            containers = [one["Id"] for one in daemon.containers(f"{LABEL}=1") if self._is_ours(daemon, one["Id"])]
        return containers + marked_processes(self.mark)

    def _is_ours(self, daemon: Daemon, container: str) -> bool:
        attributes = daemon.inspect(container)
        return attributes is not None and f"{MARK}={self.mark}" in attributes["Config"]["Env"]


def engine_image() -> str:
    """The test engine's image, made if it is not here yet."""
    import docker

    with contextlib.closing(docker.from_env()) as client:
        return python_image(client)


def marked_processes(mark: str) -> list[str]:
    """Processes whose environment bears the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(folder.name)
    return found


def reapers_of(owner: int) -> list[str]:
    """Reapers that the process ``owner`` has started: it is their last argument."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"/reaper_main.py") for word in words) and words[-2] == str(owner).encode():
                    found.append(f"reaper {folder.name}")
    return found


def make_place(name: str, folder: Path, mark: str | None = None, hook: StepHook = lambda _: None) -> Place:
    """The place of that name; ``hook`` is told of the steps of a start where there are several."""
    return DockerPlace(folder, mark, hook) if name == "docker" else ProcessPlace(folder, mark)
