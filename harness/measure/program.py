"""Whether an engine's program stays the one that a run began with."""

from __future__ import annotations

import contextlib

from harness.engines.base import Engine, Options
from harness.errors import UntrustedError


class ProgramWatch:
    """The files of an engine that runs as a process, as they were when they were first looked at."""

    def __init__(self, engine: Engine, options: Options) -> None:
        self._engine, self._options = engine, options
        self._first: tuple[tuple[str, int, int, int], ...] = ()

    def check(self) -> None:
        """Compare them.

        Raises:
            UntrustedError: one was replaced, by an upgrade as a rule: the loads are of two engines.
        """
        now = []
        for path in self._engine.installed(self._options):
            with contextlib.suppress(OSError):
                state = path.stat()
                now.append((str(path), state.st_ino, state.st_size, state.st_mtime_ns))
        self._first = self._first or tuple(now)
        changed = [one for one in self._first if one not in now]
        if changed:
            raise UntrustedError(
                f"{changed[0][0]} was replaced during the run (an upgrade?), so the loads are of two engines",
                hint="calibrate again",
                code="engine-changed",
            )
