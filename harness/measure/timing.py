"""Prompts: their lengths, which speeds are worth their time, who else used the CPU; and where the seconds of a run went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from harness.fit.load_plan import DEFAULT_BATCH
from harness.fit.speed import repeats_agree
from harness.model.facts import LoadFacts
from harness.model.record import LoadRequest, Record, Speed

#: A prompt after which the driver's pools have grown: two physical batches.
BATCHES_OF_PROMPT: Final = 2
#: Without flash attention the pools grow with the tokens in the cache: the whole context is filled, up to this many tokens.
LONGEST_PROMPT: Final = 32_768
#: A prompt that would take longer than this to read is not timed, seconds (a software GPU reads a few tokens a second).
PROMPT_BUDGET: Final = 60.0
#: A first timing that took longer than this is not repeated, seconds.
REPEAT_BUDGET: Final = 5.0
#: How long a prompt is timed again while its timings differ too much, seconds; and where others take more of the CPU than this.
SPEED_BUDGET: Final = 120.0
BUSY_BUDGET: Final = 10.0
OTHERS: Final = 0.15
#: A host of which others take more than this for so long, seconds, is not timed: even a single prompt would be a minute's wait.
MOST_OTHERS: Final = 0.5
WATCH_SECONDS: Final = 3.0
WATCHES: Final = 12
#: CPU seconds of a machine below which shares of them are not known: its clock has ticks of 10 ms (proc_stat(5)).
LEAST_CPU_SECONDS: Final = 0.5


def prompt_length(request: LoadRequest, facts: LoadFacts | None) -> int:
    """Tokens of the prompt after which a load's memory is read; ``facts`` where a driver's meter reads it."""
    length = BATCHES_OF_PROMPT * (request.num_batch or DEFAULT_BATCH)
    if facts is not None and facts.flash_attention == "disabled":
        length = max(length, LONGEST_PROMPT)
    return min(length, request.context - 8)


def prompts_to_time(
    prompts: Sequence[int],
    speeds: Sequence[Speed],
    cpu: CpuWatch,
    *,
    on_host: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[int]:
    """The prompts to time, one after the other; ``speeds`` are the answers so far.

    The first one is timed until its speed has a bound, for two minutes at most; one that is slow is timed once. Each longer
    one follows once, unless the last one's rate makes it too long, or nothing of it would be given: repeats differ too much, or
    on the host (``on_host``) others take the CPU. Repeats differ for as long as these run: ten seconds are spent then, and on
    the host no longer than the rest of ten could make up for what others have taken.
    """
    begin = clock()
    yield prompts[0]
    slow = clock() - begin > REPEAT_BUDGET
    while not slow and not repeats_agree(speeds):
        others = cpu.by_others() or 0.0
        budget = SPEED_BUDGET if others <= OTHERS else BUSY_BUDGET * OTHERS / others if on_host else BUSY_BUDGET
        if clock() - begin > budget:
            return
        yield prompts[0]
    for prompt in prompts[1:]:
        if (on_host and _busy(cpu)) or not _in_budget(speeds[-1], prompt):
            return
        yield prompt


def busy_before(cpu: CpuWatch, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Why nothing is timed on the host: others take more than half of its CPU, for three seconds; ``None``: they do not."""
    share = None
    for _ in range(WATCHES):
        share = cpu.by_others()
        if share is not None and share <= MOST_OTHERS:
            return None
        sleep(WATCH_SECONDS / WATCHES)
    return None if share is None else f"other processes took {share:.0%} of the CPU before it was to be timed"


def _busy(cpu: CpuWatch) -> bool:
    return (cpu.by_others() or 0.0) > OTHERS


def seconds_spent(record: Record) -> dict[str, float]:
    """Where the seconds of a run went, by what they were spent on; they add up to all of them."""
    spent = dict.fromkeys(("engine start", "loads", "memory readings", "prompts", "dry runs", "speed"), 0.0)
    for load in record.loads:
        whole = (load.ended or load.started) - load.started
        if load.request.purpose == "dry-run":
            spent["dry runs"] += whole
        elif load.request.purpose in ("speed", "host-speed"):
            spent["speed"] += whole
        elif load.ready is not None and load.ended is not None:
            spent["loads"] += load.ready - load.started
            spent["memory readings"] += load.settle_seconds
            spent["prompts"] += load.request_seconds
    if record.loads:
        spent["engine start"] = record.loads[0].started
    return {**spent, "other": max((record.seconds or 0.0) - sum(spent.values()), 0.0)}


def _in_budget(last: Speed, prompt: int) -> bool:
    return last.prompt_tokens_per_s is not None and prompt / last.prompt_tokens_per_s <= PROMPT_BUDGET


class CpuWatch:
    """Begins now: the share of this machine's CPU time that others than the engine's processes take from here on."""

    def __init__(self, pids: Callable[[], frozenset[int]]) -> None:
        self._pids = pids
        self._busy, self._total = _machine()
        self._own = _own(pids())

    def by_others(self) -> float | None:
        """From 0 to 1; ``None`` where too little time has passed for a clock of 10 ms."""
        busy, total = _machine()
        if total - self._total < LEAST_CPU_SECONDS:
            return None
        own = _own(self._pids()) - self._own
        return round(min(max((busy - self._busy - own) / (total - self._total), 0.0), 1.0), 3)


def _machine() -> tuple[float, float]:
    """CPU seconds of this machine since its start: busy ones, and all (proc_stat(5))."""
    import psutil

    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # they are counted in user time already
    total = sum(times) - guests
    return total - times.idle - getattr(times, "iowait", 0.0), total


def _own(pids: frozenset[int]) -> float:
    import psutil

    seconds = 0.0
    for pid in pids:
        with suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            seconds += times.user + times.system
    return seconds
