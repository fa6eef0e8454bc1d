"""Sandbox ``process``: the engine as a process of this machine, below the reaper, with a small clean environment."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Literal

from harness.errors import BusyError, NotFoundError, NotPermittedError, UsageError
from harness.ownership import MARK
from harness.sandboxes.base import ImageFacts, Launch, Site
from harness.sandboxes.environment import clean_environment
from harness.sandboxes.log_pump import hidden_values, scrub_file
from harness.sandboxes.reaper import Reaper


class ProcessSandbox:
    """Starts engines as processes."""

    name: Literal["process"] = "process"

    def __init__(self, reaper: Reaper | None = None) -> None:
        self._reaper = reaper or Reaper()
        self._owns_reaper = reaper is None
        self._running: ProcessEngine | None = None

    def __enter__(self) -> ProcessSandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def site(self, port: int | None = None) -> Site:
        """A free port of 127.0.0.1, or ``port`` if it is free."""
        return Site(sandbox="process", host="127.0.0.1", port=free_port(port))

    def start(self, launch: Launch, site: Site, log: Path) -> ProcessEngine:
        """Start the program ``launch.argv[0]`` (a path, or a name on PATH) below the reaper.

        Raises:
            NotFoundError: there is no such program. NotPermittedError: it is not executable. BusyError: an engine of
                this sandbox still runs. EngineError: it cannot be started.
        """
        program = find_program(launch.argv[0], os.environ.get("PATH"))
        self._reaper.start()
        env = clean_environment(os.environ, network=launch.network) | launch.env
        for name in launch.secrets:
            check_secret_name(name)
        start = log.stat().st_size if log.exists() else 0
        pid = self._reaper.spawn(
            (program, *launch.argv[1:]), env=env, cwd=Path("/"), log=log, memory_limit=launch.memory_limit,
            secrets=launch.secrets, home=launch.home,
        )  # fmt: skip
        hidden = hidden_values(launch, os.environ)
        self._running = ProcessEngine(self._reaper, pid, f"http://{site.host}:{site.port}", log, start=start, hidden=hidden)
        return self._running

    def close(self) -> None:
        """End what still runs; the reaper too, where it is this sandbox's own."""
        try:
            if self._running is not None:
                self._running.stop()
        finally:
            if self._owns_reaper:
                self._reaper.close()


class ProcessEngine:
    """A running engine process."""

    def __init__(
        self,
        reaper: Reaper,
        pid: int,
        endpoint: str,
        log: Path,
        *,
        start: int,
        hidden: tuple[bytes, ...],
    ) -> None:
        self._reaper = reaper
        self._start: int | None = start
        self._hidden = hidden
        self.pid = pid
        self.endpoint = endpoint
        self.log = log
        self.image: ImageFacts | None = None

    def pids(self) -> frozenset[int]:
        """PIDs of the engine and all its descendants, detached ones included. Empty once it has ended."""
        return self._reaper.pids()

    def end_network(self) -> None:
        """A process has the network of this machine."""

    def exit_status(self) -> int | None:
        """The exit status (128 + signal for a killed one); ``None`` while it runs.

        Raises:
            EngineError: the reaper died, and the engine with it (``supervision-lost``).
        """
        return self._reaper.exit_status(self.pid)

    def stop(self, timeout: float = 10.0) -> None:
        """End it and everything it started; harmless when it has ended already. The log is complete afterwards.

        Secrets that the engine has written into it are masked then.
        """
        try:
            self._reaper.end(self.pid, timeout)
        finally:
            if self._start is not None:
                scrub_file(self.log, self._start, self._hidden)
                self._start = None


def free_port(port: int | None = None) -> int:
    """``port`` of 127.0.0.1 if it is free, else an error; any free one for ``None``.

    Raises:
        UsageError: it is not a port. BusyError: it is taken. NotPermittedError: it needs privileges.
    """
    if port is not None and not 0 < port < 1 << 16:
        raise UsageError(f"{port} is not a TCP port (1 to 65535)")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
            probe.listen()  # with SO_REUSEADDR it is listen() that finds another listener, not bind()
        except PermissionError as error:
            raise NotPermittedError(f"port {port} of 127.0.0.1 may not be used: {error.strerror}") from error
        except OSError as error:
            raise BusyError(f"port {port} of 127.0.0.1 is taken", hint="choose another port, or none") from error
        return int(probe.getsockname()[1])


def check_secret_name(name: str) -> None:
    """Refuse what is not a plain file name.

    Raises:
        UsageError: it is none.
    """
    if name in ("", ".", "..", MARK) or "/" in name or "\0" in name:
        raise UsageError(f"not a name for a secret: {name!r}")


def find_program(name: str, search: str | None) -> str:
    """The path of a program.

    Raises:
        NotFoundError: it does not exist. NotPermittedError: it is not executable.
    """
    if "/" not in name:
        found = shutil.which(name, path=search)
        if found is None:
            raise NotFoundError(f"there is no program {name!r} on PATH")
        return found
    path = Path(name)
    try:
        regular = path.is_file()
    except ValueError:  # a NUL character
        regular = False
    if not regular:
        raise NotFoundError(f"there is no program {name!r}")
    if not os.access(path, os.X_OK):
        raise NotPermittedError(f"{name!r} is not executable", hint=f"chmod +x {name}")
    return str(path.absolute())
