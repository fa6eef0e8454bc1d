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
    state = path.stat()
    key, seen = str(path), [state.st_size, state.st_mtime_ns, state.st_ino]
    cache = cache_folder() / "digests.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(cache.read_text()))
    with suppress(KeyError, TypeError, IndexError):
        if known[key][0] == seen:
            return str(known[key][1])
    with path.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(HarnessError):  # without a cache it is hashed again next time
        write_atomically(cache, json.dumps({**known, key: [seen, digest]}, indent=1).encode())
    return digest
