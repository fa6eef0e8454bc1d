"""The seam between engines and where they run.

An engine says *what* to start (:class:`Launch`); a sandbox knows *how*, and hands back a :class:`Running` engine: its
endpoint, its processes, its complete log, its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Protocol

import msgspec

SandboxName = Literal["docker", "process"]


class GpuRequest(msgspec.Struct, frozen=True):
    """Which GPUs an engine may see: all, none, or those named (NVIDIA UUIDs or indices, llama.cpp device names)."""

    mode: Literal["all", "none", "ids"] = "all"
    ids: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> GpuRequest:
        """Read ``--gpus``: ``all``, ``none``, or a comma list."""
        word = text.strip()
        if word in ("all", "none"):
            return cls(mode=word)  # type: ignore[arg-type]
        ids = tuple(part.strip() for part in word.split(",") if part.strip())
        if not ids:
            raise ValueError("--gpus needs all, none, or a list of GPUs")
        return cls(mode="ids", ids=ids)


#: Where secrets lie in a container; of a process, whose folder has another name, it stands for that in its environment.
SECRETS: Final = "/run/secrets"
#: Stands for the private folder of an engine in a process, in the values of its environment.
PRIVATE: Final = "/run/harness-private"


class Home(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine finds in its private folder (processes only): files with their content, and links, by path in it."""

    files: dict[str, bytes] = {}
    links: dict[str, str] = {}


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A folder, file or named volume of the host, seen inside a container at ``target``."""

    kind: Literal["bind", "volume"]
    source: str
    target: str
    read_only: bool = True


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine will find itself: the address to listen on and how host files are reached."""

    sandbox: SandboxName
    host: str
    port: int

    def place(self, path: Path, folder: str = "/models") -> tuple[str, tuple[Mount, ...]]:
        """The name of a host file inside the sandbox, and the mount that puts it there (none for a process)."""
        if self.sandbox == "process":
            return str(path), ()
        target = f"{folder}/{path.name}"
        return target, (Mount(kind="bind", source=str(path), target=target),)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine wants started.

    ``argv`` is the whole command for a process, and the arguments after the image's entry point for a container.
    ``env`` is added to a small, clean environment; it replaces nothing silently. ``secrets`` maps file names to
    contents that must never stand in an environment, a log or a record: a sandbox offers them as files of mode 0400 in
    ``/run/secrets`` (containers) or in a private folder (processes), which ``HARNESS_SECRETS`` names; values of ``env`` that
    hold ``/run/secrets`` then hold that folder.

    ``network`` says that it has something to fetch first; :meth:`Running.end_network` ends that.
    ``hidden`` are values that must not stand in its log.
    ``home`` is put into a private folder, which ends with the engine, and which values of ``env`` name by :data:`PRIVATE`.

    ``memory_limit`` is the most anonymous memory, in bytes, that it may take: a load that cannot fit then fails instead of
    exhausting the machine.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    image: str | None = None
    mounts: tuple[Mount, ...] = ()
    gpus: GpuRequest = GpuRequest()
    memory_limit: int | None = None
    ipc_host: bool = False
    writable: tuple[str, ...] = ()
    network: bool = False
    secrets: dict[str, str] = {}
    hidden: tuple[str, ...] = ()
    home: Home | None = None


class ImageFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The image of a container; ``digest`` is ``sha256:…``: the repository's where it has one, else the image's own.

    ``command`` is its entry point, or its command where it has none.
    """

    reference: str
    digest: str | None
    command: tuple[str, ...] = ()


class Running(Protocol):
    """A started engine. Every method may be called from any thread."""

    @property
    def endpoint(self) -> str:
        """Base URL on this machine, without a trailing slash."""

    @property
    def log(self) -> Path:
        """The complete raw log (stdout and stderr together), growing while the engine runs."""

    @property
    def image(self) -> ImageFacts | None:
        """The image; ``None`` for a process."""

    def pids(self) -> frozenset[int]:
        """Host PIDs of the engine and all its children, now. Empty once it has ended."""

    def end_network(self) -> None:
        """Take the network away that its launch asked for: what it needed has been fetched. Harmless where it has none."""

    def exit_status(self) -> int | None:
        """The exit status (128 + signal for a killed one); ``None`` while it runs."""

    def stop(self, timeout: float = 10.0) -> None:
        """End it and everything it started; harmless when it has ended already. The log is complete afterwards."""


class Sandbox(Protocol):
    """A place that starts engines clean, one at a time, and leaves nothing behind."""

    @property
    def name(self) -> SandboxName:
        """``docker`` or ``process``."""

    def site(self, port: int | None = None) -> Site:
        """The address for the next engine; ``port`` asks for a particular one (BusyError if it is taken)."""

    def start(self, launch: Launch, site: Site, log: Path) -> Running:
        """Start an engine; its output goes to ``log`` (appended).

        Raises:
            NotFoundError, UnavailableError, NotPermittedError, EngineError: as the design's exit codes say.
        """

    def close(self) -> None:
        """End whatever still runs."""
