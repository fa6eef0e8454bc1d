"""Digests of model files: they have tens of gigabytes, so each is read once."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.store.catalog import cache_folder
from harness.store.store import write_atomically


def cached_sha256(path: Path) -> str:
    """``sha256:…`` of a file, kept in the cache folder by its size, time and inode.

    Raises:
        OSError: it cannot be read.
    """
    key, seen = str(path), _state(path)
    known = _known()
    with suppress(KeyError, TypeError, IndexError):
        if known[key][0] == seen:
            return str(known[key][1])
    with path.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(HarnessError):  # without a cache it is hashed again next time
        write_atomically(cache_folder() / "digests.json", json.dumps({**known, key: [seen, digest]}, indent=1).encode())
    return digest


def file_of(digest: str) -> Path | None:
    """A file that had a digest when it was read, and has not been changed since; ``None``: none is known."""
    for key, value in _known().items():
        with suppress(OSError, TypeError, IndexError):
            if value[1] == digest and value[0] == _state(Path(key)):
                return Path(key)
    return None


def _known() -> dict[str, Any]:
    """Size, time and inode of each file that was read, and its digest."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((cache_folder() / "digests.json").read_text()))
    return {}


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]
