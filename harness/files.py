"""What not every system has: flags of open(2), and locks of open files (``flock``).

Where there are no locks, files are still written whole, and nothing waits.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Final

#: As it is, and not inherited by what is started.
PLAIN: Final = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
#: To read a file that may be a pipe without waiting for its writer, and one that may be a link without following it.
AT_ONCE: Final = getattr(os, "O_NONBLOCK", 0)
NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)


def lock(file: BinaryIO | int) -> None:
    """Lock an open file, or its descriptor, for as long as it is open.

    Raises:
        BlockingIOError: another process holds it. OSError: its disk has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def share(file: BinaryIO | int) -> None:
    """Hold an open file with others, for as long as it is open; whoever wants to :func:`lock` it is refused meanwhile.

    Raises:
        BlockingIOError: another process has locked it. OSError: its disk has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_locked(descriptor: int) -> bool:
    """Whether another process holds the lock of an open file."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
