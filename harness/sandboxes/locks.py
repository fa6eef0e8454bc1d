"""One harness for one GPU at a time.

The lock is the kernel's (``flock``): it ends with its holder, however that dies, so there is nothing stale to clear. The
file stays, and its content only says who held it last. It is a lock between the runs of one user; other users of a GPU
are found by the meter.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.errors import BusyError, CannotWriteError
from harness.text import one_line


@contextlib.contextmanager
def hold(names: Iterable[str], folder: Path | None = None) -> Iterator[None]:
    """Hold the locks of all ``names`` (UUIDs of GPUs, or their names), or of none.

    ``folder`` is where the lock files lie; by default the user's runtime folder, which a reboot empties.

    Raises:
        BusyError: another process holds one of them. CannotWriteError: the lock files cannot be written.
    """
    import filelock
    import platformdirs

    with warnings.catch_warnings():  # where a session has no runtime folder, one below the temporary folder is as good
        warnings.simplefilter("ignore")
        place = folder or Path(platformdirs.user_runtime_path("harness"))
    with contextlib.ExitStack() as held:
        for name in sorted(set(names)):  # one order for everybody: no two runs can wait for each other
            path = place / f"{urllib.parse.quote(name, safe='')}.lock"
            try:
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
                held.enter_context(filelock.FileLock(path, timeout=0))
                path.with_suffix(".holder").write_text(str(os.getpid()), encoding="ascii")
            except filelock.Timeout:
                raise BusyError(
                    f"{one_line(name)} is being measured by another harness{_holder(path)}",
                    hint="wait for it, or choose another GPU with --gpus",
                    code="gpu-busy",
                ) from None
            except OSError as error:
                raise CannotWriteError(f"cannot lock {one_line(name)} in {place}: {error.strerror}") from error
        yield


def _holder(lock: Path) -> str:
    try:
        pid = lock.with_suffix(".holder").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return f" (process {pid})" if pid.isdigit() else ""
