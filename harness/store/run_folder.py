"""The folder of a run while it runs: marked as ours, and locked for as long as we live.

The mark is written before anything else, so that the rest of a killed run is distinguishable from a folder of the user's.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from harness.errors import CannotWriteError, NotFoundError
from harness.files import AT_ONCE, NO_LINK, PLAIN, is_locked, lock
from harness.ownership import MARK, Life, Owner, this_process

#: What a run writes into its folder. A folder that holds anything else is never removed.
_OURS: Final = re.compile(
    r"\.harness-run|record\.json|[a-z][a-z0-9-]*\.log|\.[A-Za-z0-9._-]+\.harness-[0-9a-f]{8}\.part", re.ASCII
)


class RunFolder:
    """A new folder of a run, locked until :meth:`close` or our end.

    Raises:
        CannotWriteError: it cannot be made, or exists already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True)
            self._mark = os.open(path / MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o600)
            os.write(self._mark, msgspec.json.encode(this_process()))
            with suppress(OSError):  # a disk without locks: the owner's name is what is left
                lock(self._mark)
        except OSError as error:
            raise CannotWriteError(f"{path} cannot be made: {error.strerror}") from error

    def close(self) -> None:
        """Give the lock back; harmless when it was given back."""
        if self._mark >= 0:
            os.close(self._mark)
            self._mark = -1


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """A folder that is locked within the block."""
    folder = RunFolder(path)
    try:
        yield
    finally:
        folder.close()


def life_of(folder: Path) -> Life | None:
    """Whether the run of a folder lives; ``None`` where the folder bears no mark of ours."""
    try:
        mark = os.open(folder / MARK, os.O_RDONLY | NO_LINK | PLAIN)
    except OSError:
        return None
    try:
        owner = msgspec.json.decode(os.read(mark, 4096), type=Owner)
        if is_locked(mark):
            return "alive"
    except (OSError, msgspec.DecodeError):
        return "unknown"
    finally:
        os.close(mark)
    return owner.life()


def others(folder: Path) -> tuple[str, ...]:
    """Names in a folder that no run writes: links, folders, files of the user's."""
    with os.scandir(folder) as entries:
        return tuple(
            sorted(one.name for one in entries if not one.is_file(follow_symlinks=False) or not _OURS.fullmatch(one.name))
        )


def remove(folder: Path) -> None:
    """Remove a run's files and then its folder, which stays if anything else is in it. Links are not followed.

    Raises:
        CannotWriteError: something cannot be removed.
    """
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            names = [
                name
                for name in os.listdir(place)  # noqa: PTH208 - of the folder that was opened, whatever its path is now
                if _OURS.fullmatch(name)
            ]
            for name in sorted(names, key=lambda name: name == MARK):  # the mark goes last
                os.unlink(name, dir_fd=place)
        finally:
            os.close(place)
        folder.rmdir()
    except OSError as error:
        raise CannotWriteError(f"{folder} cannot be removed: {error.strerror}") from error


def is_plain(path: Path) -> bool:
    """Whether it is a file, and no link, pipe or name that no file can have."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def read_plain(path: Path, most: int = -1) -> bytes:
    """A file's content, ``most`` bytes of it at most.

    Raises:
        NotFoundError: there is none, or it is a link, a pipe or a folder.
    """
    with _opened(path) as file:
        return file.read(most)


def copy_run(source: Path, target: Path) -> None:
    """Copy the files that a run writes; links, folders and anything else that is there stay where they are.

    Raises:
        CannotWriteError: the target.
    """
    names = sorted(one.name for one in source.iterdir() if _OURS.fullmatch(one.name) and not one.name.startswith("."))
    for name in sorted(names, key=lambda name: name == "record.json"):  # it comes last: without one it is not yet a run
        mode = 0o644 if name == "record.json" else 0o600
        with suppress(NotFoundError), _opened(source / name) as file, whole_file(target / name, mode) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_LINK | AT_ONCE | PLAIN)
    except OSError as error:
        raise NotFoundError(f"{path} is not a plain file: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotFoundError(f"{path} is not a plain file")
        yield file


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that is written within the block, and is there whole after it, or not at all.

    Raises:
        CannotWriteError: the folder is read-only or the disk is full.
    """
    partial = path.with_name(f".{path.name}.harness-{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, mode)
        with os.fdopen(descriptor, "wb") as file:
            with suppress(OSError):  # whoever clears up can tell that it is being written; a disk may have no locks
                lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CannotWriteError(f"{path} cannot be written: {error.strerror}", code="cannot-write") from error
    finally:
        with suppress(OSError):
            partial.unlink()
