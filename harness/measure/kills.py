"""Whether an engine that was killed was killed for its memory.

A SIGKILL says nothing of its reason: the kernel's OOM killer sends it, and so does an administrator, a job's time limit or a
script. It counts as a load that does not fit only with evidence; without any the load is made once more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from harness.engines.base import KILLED, OUT_OF_MEMORY
from harness.errors import EngineError
from harness.meters.host import available_memory
from harness.model.record import Load, LoadOutcome, LoadRequest
from harness.sandboxes.tail import last_lines
from harness.units import format_size

#: Share of the memory that was available at the start of a load, from which on what it held, or needs, explains its end.
_ALL_OF_IT: Final = 0.85
#: Count of OOM kills of this machine, of those inside a cgroup's limit too (mm/oom_kill.c, ``__oom_kill_process``; Linux 4.13).
_OOM_KILL: Final = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)


class KillWatch:
    """Begins now: what was available, and how many processes the kernel had killed for memory."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._kills, self._available = oom_kills(proc), available_memory(proc)

    def outcome(self, error: EngineError, held: int | None, needed: int | None) -> tuple[LoadOutcome, str]:
        """What an error that ended a load means, where it is that the engine was killed; any other one is raised."""
        if error.code == OUT_OF_MEMORY:
            return "wont-fit", error.message
        if error.code != KILLED:
            raise error
        why = self.evidence(held, needed)
        return ("failed", error.message) if why is None else ("wont-fit", f"{error.message} ({why})")

    def evidence(self, held: int | None, needed: int | None) -> str | None:
        """Why an engine that was killed did not fit; ``None`` where nothing says so.

        ``held`` is the most that it was seen to hold of host memory, ``needed`` what the load takes by those before it (bytes).
        """
        kills = oom_kills(self._proc)
        if kills is not None and self._kills is not None and kills > self._kills:
            return "the kernel's OOM killer ended a process meanwhile"
        for size, word in ((held, "held"), (needed, "would need")):
            if size is not None and self._available is not None and size >= _ALL_OF_IT * self._available:
                return f"it {word} {format_size(size)}, and {format_size(self._available)} was available"
        return None


def refuse_killed(load: Load, folder: Path) -> None:
    """Refuse a load whose engine was killed without evidence that it was for memory; ``folder`` has its log.

    Raises:
        EngineError: it was.
    """
    if load.outcome == "failed":
        asked, reason = f"{load.request.context:,} tokens", load.reason or "it was killed"
        raise EngineError(
            f"{reason if asked in reason else f'{asked}: {reason}'}; nothing says that memory was short",
            tail=() if load.log is None else last_lines(folder / load.log, 12),
            hint="see who ends processes here (dmesg, journalctl -k, a job's limits), then calibrate again",
            code=KILLED,
        )


def oom_kills(proc: Path = Path("/proc")) -> int | None:
    """Processes that the kernel of this machine has killed for memory since its start; ``None`` where it does not say."""
    try:
        found = _OOM_KILL.search((proc / "vmstat").read_bytes())
    except OSError:
        return None
    return int(found[1]) if found else None


def expected_bytes(loads: Sequence[Load], request: LoadRequest) -> int | None:
    """What a load takes on the line through the two largest loads of its batch so far; ``None`` where there are fewer."""
    known = {}
    for load in loads:
        plateau = load.busy or load.idle
        if load.outcome == "ok" and load.request.num_batch == request.num_batch and plateau and plateau.total_bytes:
            known[load.request.context] = plateau.total_bytes
    if len(known) < 2:
        return None
    (x, low), (y, high) = sorted(known.items())[-2:]
    return round(high + (high - low) / (y - x) * (request.context - y))
