"""The engines that there are: harness's own, and those that other packages declare.

An engine is a package (or module) with two functions: ``get_policy()`` returns its :class:`~harness.engines.policy.Policy`,
``get_recipe()`` its :class:`~harness.engines.base.Engine`. A third one, ``get_servers()``, may list its servers that run
already. It is declared as an entry point of the group ``harness.engines``: the engine's name, and the package.

``harness check`` runs before every start of a model, and reading the metadata of every installed package takes longer than its
answer. So harness's own engines stand here as well as in ``pyproject.toml`` (a test compares the two), and metadata is read
only for a name that is not among them, or to list all.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Final, Protocol, cast

from harness.errors import HarnessError, UnavailableError
from harness.model.facts import EngineName

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from pathlib import Path

    from harness.engines.base import Engine, RemoteRegistry
    from harness.engines.policy import Policy
    from harness.engines.running import RunningServer

#: Where packages declare engines.
GROUP: Final = "harness.engines"
#: harness's own, in the order in which they are shown.
BUILT_IN: Final[dict[EngineName, str]] = {
    "ollama": "harness.engines.ollama",
    "llama-server": "harness.engines.llama_server",
    "vllm": "harness.engines.vllm",
}
#: The engine of ``--engine auto`` where a container can be given an NVIDIA GPU, and the one that comes with harness (the extra
#: ``embedded``), which measures anywhere and lists the GPUs that it sees.
CONTAINED: Final[EngineName] = "ollama"
EMBEDDED: Final[EngineName] = "llama-server"
#: The engine of ``harness allocate``.
ALLOCATED: Final[EngineName] = "vllm"


class EnginePackage(Protocol):
    """What an entry point names."""

    def get_policy(self) -> Policy:
        """What the engine decides; imports nothing that starts anything."""

    def get_recipe(self) -> Engine:
        """How it is started and asked."""


@functools.cache
def policy_of(name: EngineName) -> Policy:
    """What an engine decides.

    Raises:
        UnavailableError: there is no such engine here.
    """
    return _package(name).get_policy()


def recipe_of(name: EngineName) -> Engine:
    """How an engine is started and asked; a new one each time.

    Raises:
        UnavailableError: there is no such engine here.
    """
    return _package(name).get_recipe()


def running_servers(name: EngineName) -> tuple[RunningServer, ...]:
    """Servers of an engine that run on this machine and answer; none of an engine whose package has no ``get_servers()``.

    They are asked for their version and for what they hold, and nothing else.
    """
    ask = getattr(_package(name), "get_servers", None)
    return () if ask is None else tuple(ask())


def stored_digest(name: EngineName, model: str) -> str | None:
    """The digest of a model's weights in the engine's own store on this machine.

    ``None`` where the engine has no store (``get_stored_digest`` is optional), or it does not show the model.

    Raises:
        UnavailableError: there is no such engine here.
    """
    find = getattr(_package(name), "get_stored_digest", None)
    found: str | None = None if find is None else find(model)
    return found


def name_in_file(path: Path) -> str | None:
    """The model's own name in the header of its weights; ``None`` where they name none, or are no GGUF."""
    from harness.engines.gguf import name_in, read_header

    try:
        return name_in(read_header(path))
    except HarnessError:
        return None


def remote_registry(name: EngineName) -> RemoteRegistry | None:
    """The registry of an engine's models; ``None`` where it has none (``get_remote_registry`` is optional)."""
    get = getattr(_package(name), "get_remote_registry", None)
    return None if get is None else cast("RemoteRegistry", get())


def version_here(name: EngineName, sandbox: str) -> str | None:
    """The version of an engine that would run in a sandbox now, where that is known without starting anything.

    ``None`` also for an engine whose package has no ``get_version_here()``.
    """
    ask = getattr(_package(name), "get_version_here", None)
    return None if ask is None else cast("str | None", ask(sandbox))


def releases_of(name: EngineName) -> tuple[str, ...]:
    """Releases of an engine that a package index has; its package has ``get_releases()`` and ``get_release_binary()``.

    Raises:
        UnavailableError: the engine comes from no index, or that does not answer.
    """
    ask = getattr(_package(name), "get_releases", None)
    if ask is None:
        raise UnavailableError(f"{name} is installed from no package index", code="no-releases")
    return tuple(ask())


def release_binary(name: EngineName, release: str, cache: Path) -> Path:
    """A program that starts one of :func:`releases_of`, installed below ``cache``.

    Raises:
        UnavailableError: it cannot be installed here.
    """
    return cast("Path", getattr(_package(name), "get_release_binary")(release, cache))  # noqa: B009 - optional in a package


@functools.cache
def engine_names() -> tuple[EngineName, ...]:
    """All engines: harness's own first, then others by name."""
    return (*BUILT_IN, *sorted(set(_declared()) - set(BUILT_IN)))


def is_engine(name: str) -> bool:
    """Whether there is such an engine here."""
    return name in BUILT_IN or name in engine_names()


@functools.cache
def _declared() -> dict[EngineName, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


def _package(name: EngineName) -> EnginePackage:
    if (module := BUILT_IN.get(name)) is not None:
        return cast("EnginePackage", importlib.import_module(module))
    point = _declared().get(name)
    if point is None:
        raise UnavailableError(
            f"there is no engine {name} here; there are: {', '.join(engine_names())}",
            hint="install the package that declares it",
            code="no-engine",
        )
    return cast("EnginePackage", point.load())
