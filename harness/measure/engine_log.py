"""What an engine's log says: of a load, and of its end."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from harness.engines.base import KILLED, could_not_allocate
from harness.engines.cpu import cpu_flags, lacking
from harness.engines.policy import Policy
from harness.errors import EngineError, HarnessError, WontFitError
from harness.model.facts import LoadFacts
from harness.model.record import Gpu
from harness.polling import poll
from harness.sandboxes.base import ImageFacts, Running
from harness.sandboxes.tail import last_lines
from harness.units import format_size

#: 128 + SIGILL.
ILLEGAL_INSTRUCTION: Final = 132
_SIGKILL: Final = 137
#: How long a log may take to show which devices an engine has that answers already, seconds.
DEVICES_LINE: Final = 2.0


def read_facts(log: Path, start: int, end: int | None, policy: Policy) -> LoadFacts | None:
    """The last load that a stretch of a log tells of, a complete one if there is any."""
    with log.open("rb") as file:
        file.seek(start)
        data = file.read() if end is None else file.read(max(end - start, 0))
    loads = policy.parse_log(data)
    return next((facts for facts in reversed(loads) if facts.complete), loads[-1] if loads else None)


def await_facts(log: Path, start: int, limit: float, policy: Policy) -> tuple[int, LoadFacts | None]:
    """Where a growing log ends once it tells of a whole load, and what it tells; after ``limit`` seconds as it is."""
    end = -1
    facts: LoadFacts | None = None

    def settled() -> bool:
        nonlocal end, facts
        size = log.stat().st_size
        if size == end and facts is not None and facts.complete and facts.devices:
            return True  # a whole load, and nothing was written since the last look
        end, facts = size, read_facts(log, start, size, policy)
        return False

    poll(settled, limit=limit)
    return end, facts


def check_alive(running: Running, policy: Policy) -> None:
    """Raise if the engine has ended.

    Raises:
        WontFitError: its last lines say that it could not allocate. EngineError: otherwise (code ``engine-killed`` after
            SIGKILL), or as the engine's own policy explains it.
    """
    status = running.exit_status()
    if status is None:
        return
    tail = last_lines(running.log, 12)
    facts = read_facts(running.log, 0, None, policy)
    if facts is not None and (error := policy.explain_exit(facts, status, tail)) is not None:
        raise error
    import resource  # an engine runs on POSIX; its log may be read elsewhere

    if could_not_allocate("\n".join(tail)) and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        raise EngineError(
            f"the engine could not allocate memory, of which this shell allows a process {format_size(limit)} (ulimit -v)",
            tail=tail,
            hint="ulimit -v unlimited",
            code="memory-limited",
        )
    if could_not_allocate("\n".join(tail)):
        raise WontFitError("the engine could not allocate this load", tail=tail)
    if status == ILLEGAL_INSTRUCTION:
        absent = ", ".join(lacking(_head(running.log), cpu_flags()))
        raise EngineError(
            "the engine was ended by SIGILL, an illegal instruction: this build "
            + (f"was compiled for {absent}, which this CPU lacks" if absent else "needs instructions that this CPU lacks"),
            tail=tail,
            hint="leave --engine-binary out: the embedded engine runs on this CPU; or name a build for this CPU with it",
            code="illegal-instruction",
        )
    code = KILLED if status == _SIGKILL else "engine-ended"
    said = f"the engine ended with status {status}{_signal(status)}"
    raise EngineError(said, tail=tail, hint=policy.end_hint(tail), code=code)


def refuse_without_gpu(running: Running, policy: Policy, gpus: Sequence[Gpu]) -> None:
    """Refuse a server that cannot use the GPUs it was given, before anything is fetched or loaded.

    Raises:
        UnavailableError: its log says so.
    """
    line = policy.devices_line
    if line is None:
        return
    poll(lambda: line in running.log.read_bytes(), limit=DEVICES_LINE, every=0.02)  # it was written before the server answers
    if (error := policy.refuse_start(running.log.read_bytes(), gpus)) is not None:
        raise error


def explain_image(error: HarnessError, image: ImageFacts | None, policy: Policy) -> None:
    """Say of an engine that never answered that its image starts something else, where its entry point does."""
    if image is None or policy.program is None or any(policy.program in word for word in image.command):
        return
    started = " ".join(image.command) or "nothing"
    error.message = f"{image.reference} may be no image of {policy.title}, as it starts {started}: {error.message}"
    error.hint, error.code = f"--image with one of {policy.title}", "other-image"


def _signal(status: int) -> str:
    """The name of the signal behind an exit status, in parentheses; empty where it was none."""
    try:
        return f" ({signal.Signals(status - 128).name})" if status > 128 else ""
    except ValueError:
        return ""


def _head(log: Path) -> str:
    """The first lines of a log, where an engine says what it was compiled for."""
    try:
        with log.open("rb") as file:
            return file.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return ""
