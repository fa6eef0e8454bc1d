"""``harness clean``: what harness has left on this machine, and the removal of what nobody needs any more."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.errors import CannotWriteError, UnavailableError
from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.leftovers import Leftover, leftovers, remove
from harness.store.store import RUNS

#: A file that is being written, or a run, is given this long before it counts as abandoned, seconds.
GRACE: Final = 3600.0
#: How the store names what it is still writing.
_PARTIAL: Final = re.compile(r"\..+\.[0-9a-f]{8}\.part")

State = Literal["abandoned", "in-use", "kept"]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """Something of harness's. Only what is ``abandoned`` is ever removed; ``why`` is for the user."""

    kind: Literal["container", "volume", "file", "run"]
    name: str
    state: State
    why: str
    removed: bool = False


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; ``docker`` says why no daemon was looked at (``None``: one was)."""

    items: tuple[Item, ...]
    docker: str | None = None


def clean(store: Path, *, remove_abandoned: bool, grace: float = GRACE) -> Survey:
    """List what bears harness's label or lies half-written in its store; remove what is abandoned if asked to.

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
    for path, item in _of_store(store, time.time() - grace):
        if remove_abandoned and item.state == "abandoned":
            _remove(path)
            item = msgspec.structs.replace(item, removed=True)
        items.append(item)
    return Survey(items=tuple(items), docker=docker)


def _of_docker(one: Leftover) -> Item:
    owner = f"process {one.owner_pid}" if one.owner_pid else "an unknown process"
    why = {
        "abandoned": f"its harness ({owner}) has ended, or it is past its time",
        "in-use": f"its harness ({owner}) still runs",
        "kept": f"models that were downloaded to stay: docker volume rm {one.name} removes them",
    }[one.state]
    return Item(kind=one.kind, name=one.name, state=one.state, why=why)


def _of_store(store: Path, before: float) -> Iterator[tuple[Path, Item]]:
    for path in sorted(store.glob("**/.*.part")):
        if _PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            yield path, _aged(path, "file", before, "a file whose writing was interrupted")
    for folder in sorted((store / RUNS).glob("*")):
        if not folder.is_dir() or folder.is_symlink():
            continue
        record = folder / "record.json"
        if not record.exists():
            yield folder, _aged(folder, "run", before, "a run that ended before it had measured anything")
        elif _status(record) != "complete":
            why = "a run that did not end well; its logs and readings are yours to keep or to delete"
            yield folder, Item(kind="run", name=str(folder), state="kept", why=why)


def _aged(path: Path, kind: Literal["file", "run"], before: float, why: str) -> Item:
    newest = max((one.stat().st_mtime for one in (path, *path.glob("*")) if one.exists()), default=0.0)
    if newest > before:
        return Item(kind=kind, name=str(path), state="in-use", why="written to within the last hour")
    return Item(kind=kind, name=str(path), state="abandoned", why=why)


def _status(record: Path) -> str | None:
    class Head(msgspec.Struct):
        status: str | None = None

    try:
        return msgspec.json.decode(record.read_bytes(), type=Head).status
    except (OSError, msgspec.DecodeError):
        return None


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{path} cannot be removed: {error.strerror}") from error
