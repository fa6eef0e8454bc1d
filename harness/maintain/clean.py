"""``harness clean``: what harness has left on this machine, and the removal of what is orphaned."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.engines.registry import engine_names
from harness.errors import CannotWriteError, UnavailableError
from harness.files import NO_LINK, PLAIN, is_locked
from harness.headers import holes as headers
from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.leftovers import Leftover, leftovers, remove
from harness.sandboxes.reaper_main import FOLDERS, HOME_PREFIX, SECRETS_PREFIX, remove_folder
from harness.store.catalog import cache_folder
from harness.store.run_folder import life_of, others
from harness.store.run_folder import remove as remove_run
from harness.store.store import RUNS
from harness.units import format_size

#: How the store names what it is still writing.
_PARTIAL: Final = re.compile(r"\..+\.harness-[0-9a-f]{8}\.part")

State = Literal["abandoned", "in-use", "kept"]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """Something of harness's. What is ``abandoned`` is removed, and what is kept if its ``option`` asks for that."""

    kind: Literal["container", "volume", "network", "file", "folder", "run", "secrets", "header", "cache"]
    name: str
    state: State
    why: str
    removed: bool = False
    option: Literal["cache", "failed-runs"] | None = None


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; ``docker`` says why no daemon was looked at (``None``: one was)."""

    items: tuple[Item, ...]
    docker: str | None = None


def clean(store: Path, *, remove_abandoned: bool, asked: frozenset[str] = frozenset()) -> Survey:
    """List what bears harness's label or mark; remove what is abandoned if asked to.

    Abandoned is what provably has no owner. Age and place prove nothing.

    Raises:
        NotPermittedError: the Docker socket may not be used. UnavailableError: the daemon went away meanwhile.
        CannotWriteError: something in the store cannot be removed.
    """
    docker: str | None = None
    items: list[Item] = []
    try:
        daemon = Daemon()
    except UnavailableError as error:
        docker = error.message
    else:
        with daemon:
            # Containers first: a volume that one of them uses cannot be removed.
            for one in leftovers(daemon):
                item = _of_docker(one)
                if remove_abandoned and one.state == "abandoned":
                    remove(daemon, one)
                    item = msgspec.structs.replace(item, removed=True)
                items.append(item)
    for path, item in (*_of_store(store), *_of_cache(cache_folder())):
        if remove_abandoned and (item.state == "abandoned" or item.option in asked):
            _remove(path)
            item = msgspec.structs.replace(item, removed=True)
        items.append(item)
    for path, state, why in headers.survey():
        if remove_abandoned and state == "abandoned":
            headers.remove(path)
        items.append(
            Item(kind="header", name=str(path), state=state, why=why, removed=remove_abandoned and state == "abandoned")
        )
    return Survey(items=tuple(items), docker=docker)


def _of_docker(one: Leftover) -> Item:
    owner = f"process {one.owner_pid}" if one.owner_pid else "an unknown process"
    why = {
        "abandoned": f"its harness ({owner}) has ended",
        "in-use": f"its harness ({owner}) still runs",
        "unknown": f"its harness ({owner}) cannot be seen from here; if it has ended: docker {one.removal}",
        "kept": f"models that were downloaded to stay: docker volume rm {one.name} removes them",
    }[one.state]
    state: State = "in-use" if one.state == "unknown" else one.state
    return Item(kind=one.kind, name=one.name, state=state, why=why)


def _of_store(store: Path) -> Iterator[tuple[Path, Item]]:
    places = [store, *(store / engine for engine in engine_names()), store / RUNS]
    for place in places:
        yield from _partials(place)
    for folder in _folders(store / RUNS):
        yield from _of_run(folder)
    for kind, (private, prefix) in FOLDERS.items():
        for folder in (folder for place in private for folder in _folders(Path(place))):
            if folder.name.startswith(prefix):
                yield from _of_private(folder, kind)


def _of_cache(folder: Path) -> Iterator[tuple[Path, Item]]:
    """Weights that were put together from their package; they are made again when they are needed."""
    for path in _entries(folder):
        if path.suffix == ".gguf" and path.is_file() and not path.is_symlink():
            why = f"{format_size(path.stat().st_size)} of weights, made again when they are needed (--cache)"
            yield path, Item(kind="cache", name=str(path), state="kept", why=why, option="cache")


def _partials(place: Path) -> Iterator[tuple[Path, Item]]:
    """Files whose writing was interrupted: a writer holds a lock on what it writes."""
    for path in _entries(place):
        if not _PARTIAL.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | NO_LINK | PLAIN)
        except OSError:
            continue  # it was finished meanwhile
        try:
            locked = is_locked(descriptor)
        except OSError:
            locked = True  # a disk without locks proves nothing
        finally:
            os.close(descriptor)
        if locked:
            yield path, Item(kind="file", name=str(path), state="in-use", why="it is being written")
        else:
            yield path, Item(kind="file", name=str(path), state="abandoned", why="a file whose writing was interrupted")


def _of_run(folder: Path) -> Iterator[tuple[Path, Item]]:
    record, life = folder / "record.json", life_of(folder)

    def item(state: State, why: str, option: Literal["failed-runs"] | None = None) -> tuple[Path, Item]:
        return folder, Item(kind="run", name=str(folder), state=state, why=why, option=option)

    if life == "alive":
        yield item("in-use", "its harness still runs")
    elif record.exists():
        if _status(record) != "complete":
            mine: Literal["failed-runs"] | None = None if others(folder) else "failed-runs"
            yield item("kept", "a run that did not end well, with its logs and readings (--failed-runs)", mine)
    elif life is None:
        yield item("kept", "a folder without harness's mark: it is not harness's to remove")
    elif life == "unknown":
        yield item("kept", "a run of a process that cannot be seen from here")
    elif foreign := others(folder):
        yield item("kept", f"a run that ended before it had measured anything, with files that are not its own: {foreign[0]}")
    else:
        yield item("abandoned", "a run that ended before it had measured anything")


def _of_private(folder: Path, kind: str) -> Iterator[tuple[Path, Item]]:
    """Tokens, or the home of an engine in a process: the reaper removes them with the engine unless it was killed itself."""
    named: Literal["secrets", "folder"] = "secrets" if kind == "secrets" else "folder"
    life = life_of(folder)
    if life == "gone" and folder.stat().st_uid == os.geteuid():
        why = f"{'tokens' if kind == 'secrets' else 'the home'} of an engine that has ended"
        yield folder, Item(kind=named, name=str(folder), state="abandoned", why=why)
    elif life is not None:
        why = "its harness still runs" if life == "alive" else "its harness cannot be seen from here"
        yield folder, Item(kind=named, name=str(folder), state="in-use", why=why)


def _folders(place: Path) -> list[Path]:
    return [path for path in _entries(place) if path.is_dir() and not path.is_symlink()]


def _entries(place: Path) -> list[Path]:
    if place.is_symlink():
        return []
    try:
        return sorted(place.iterdir())
    except OSError:
        return []


def _status(record: Path) -> str | None:
    class Head(msgspec.Struct):
        status: str | None = None

    try:
        return msgspec.json.decode(record.read_bytes(), type=Head).status
    except (OSError, msgspec.DecodeError):
        return None


def _remove(path: Path) -> None:
    if path.name.startswith((SECRETS_PREFIX, HOME_PREFIX)):
        remove_folder(str(path))
        return
    if path.is_dir():
        remove_run(path)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{path} cannot be removed: {error.strerror}") from error
