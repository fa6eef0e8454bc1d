"""Files that stand for models: a header, then a hole as long as the weights. They are harness's own, in its cache.

``<cache>/headers/<name>-<key>/`` holds one model: its parts (``….header-only….gguf``), ``source.json``, a lock, and what an
engine made of them. The name of a part says what it is, so that it is never taken for the model itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.engines.gguf import HEADER_ONLY
from harness.errors import BusyError, CannotWriteError
from harness.files import NO_LINK, PLAIN, lock, share
from harness.polling import poll
from harness.store.catalog import cache_folder
from harness.store.store import write_atomically

_SOURCE: Final = "source.json"
_LOCK: Final = ".harness-header"
_PART: Final = "begun"
#: No model is larger than its file system and this, bytes.
LARGEST: Final = 1 << 43
#: How large a hole is tried for, and what it may take on disk.
_TRIAL: Final = 64 << 20


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What ``source.json`` says: where each part came from, its size (bytes) and its version there; ``digest`` of the model."""

    source: str
    digest: str | None = None
    revision: str | None = None
    sizes: tuple[int, ...] = ()
    versions: tuple[str | None, ...] = ()


def headers_folder() -> Path:
    """Where they are."""
    return cache_folder() / "headers"


def hole_name(name: str, number: int = 1, count: int = 1) -> str:
    """The file name of a part; of a split model as llama.cpp wants it (``llama_split_path``)."""
    return f"{name}{HEADER_ONLY}.gguf" if count == 1 else f"{name}{HEADER_ONLY}-{number:05d}-of-{count:05d}.gguf"


class CacheEntry:
    """The folder of one model, held by this process; others may read it."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor

    @property
    def kept(self) -> Kept | None:
        """What it holds; ``None`` where it is new or damaged."""
        try:
            return msgspec.json.decode((self.folder / _SOURCE).read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            return None

    def keep(self, kept: Kept) -> None:
        """Note what it holds."""
        write_atomically(self.folder / _SOURCE, msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")

    def begun(self, number: int) -> tuple[bytes, str | None]:
        """What an earlier try has left of a part, and of which version of it."""
        with suppress(OSError, ValueError):
            version = (self.folder / f"{_PART}-{number}.version").read_text()
            return (self.folder / f"{_PART}-{number}").read_bytes(), version
        return b"", None

    def begin(self, number: int, data: bytes | bytearray, version: str | None) -> None:
        """Keep what there is of a part, so that the next try goes on from there."""
        if version is not None:
            with suppress(OSError):
                (self.folder / f"{_PART}-{number}").write_bytes(data)
                (self.folder / f"{_PART}-{number}.version").write_text(version)

    def write_hole(self, name: str, header: bytes, size: int) -> Path:
        """A file of ``size`` bytes that takes the room of its header.

        Raises:
            CannotWriteError: the disk has no sparse files, or refuses one of this size.
        """
        if not len(header) <= size <= LARGEST:
            raise CannotWriteError(f"a model of {size:,} bytes is larger than any model", code="hole-too-large")
        path = self.folder / name
        partial = path.with_name(f".{name}.part")
        try:
            with partial.open("wb") as out:
                out.write(header)
                out.flush()
                self._try_hole(out.fileno(), len(header), size)
                out.truncate(size)
            partial.replace(path)
        except OSError as error:
            raise CannotWriteError(
                f"{path} cannot be made {size} bytes long: {error.strerror}",
                hint="set HARNESS_CACHE to a folder on a disk with sparse files",
                code="no-hole",
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _try_hole(self, descriptor: int, begin: int, size: int) -> None:
        """A disk without sparse files would be filled: see what a small hole takes first."""
        trial = min(size - begin, _TRIAL)
        os.ftruncate(descriptor, begin + trial)
        if _taken(descriptor) > begin + trial // 2 + (1 << 20):
            raise CannotWriteError(
                f"the disk of {self.folder} does not support sparse files: a hole takes the space of the weights",
                hint="set HARNESS_CACHE to a folder on a disk with sparse files",
                code="no-sparse-files",
            )

    def finish(self) -> None:
        """Drop what was begun: all of it is here."""
        for path in self.folder.glob(f"{_PART}-*"):
            path.unlink(missing_ok=True)


def _taken(descriptor: int) -> int:
    """What a file takes on disk, bytes; 0 where the system does not say it."""
    return int(getattr(os.fstat(descriptor), "st_blocks", 0)) * 512


@contextmanager
def entry(name: str, source: str) -> Iterator[CacheEntry]:
    """The folder of a source, for as long as the block runs; ``clean`` leaves it alone meanwhile.

    Raises:
        CannotWriteError: it cannot be made. BusyError: it is being removed.
    """
    key = hashlib.sha256(source.encode()).hexdigest()[:12]
    folder = headers_folder() / f"{name}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | NO_LINK | PLAIN, 0o600)
    except OSError as error:
        raise CannotWriteError(
            f"{folder} cannot be made: {error.strerror}", hint="set HARNESS_CACHE to a writable folder", code="no-cache"
        ) from error
    try:
        if not poll(lambda: _shared(descriptor), limit=10.0, every=0.05):
            raise BusyError(f"another harness removes {folder}", hint="try again", code="busy")
        yield CacheEntry(folder, descriptor)
    finally:
        os.close(descriptor)


def _shared(descriptor: int) -> bool:
    try:
        share(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a disk without locks
    return True


def survey() -> Iterator[tuple[Path, Literal["abandoned", "in-use"], str]]:
    """Every folder of a header, for ``harness clean``: what is in it can be read again from its source."""
    place = headers_folder()
    for folder in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDONLY | NO_LINK | PLAIN)
        except OSError:
            continue  # not ours
        try:
            lock(descriptor)
            yield folder, "abandoned", "the header of a model, without weights; it can be read again"
        except OSError:
            yield folder, "in-use", "the header of a model that is being measured"
        finally:
            os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove one of them; links are not followed.

    Raises:
        CannotWriteError: something of it cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CannotWriteError(f"{folder} cannot be removed: {error.strerror}") from error
