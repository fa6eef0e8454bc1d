"""Prompts: how long those of a load are, which speeds are worth their time, and who else used the CPU meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from harness.fit.load_plan import DEFAULT_BATCH
from harness.fit.speed import SAME_DEPTH, repeats_differ
from harness.model.facts import LoadFacts
from harness.model.record import LoadRequest, Speed

#: A prompt after which the driver's pools have grown: two physical batches.
BATCHES_OF_PROMPT: Final = 2
#: Without flash attention the pools grow with the tokens in the cache: the whole context is filled, up to this many tokens.
LONGEST_PROMPT: Final = 32_768
#: A prompt that would take longer than this to read is not timed, seconds (a software GPU reads a few tokens a second).
PROMPT_BUDGET: Final = 60.0
#: A timing that took longer than this is not repeated, seconds.
REPEAT_BUDGET: Final = 5.0
#: How long a prompt is timed again while its timings differ too much, seconds; and where others take more of the CPU than this.
SPEED_BUDGET: Final = 120.0
BUSY_BUDGET: Final = 10.0
OTHERS: Final = 0.15


def prompt_length(request: LoadRequest, facts: LoadFacts | None) -> int:
    """Tokens of the prompt after which a load's memory is read; ``facts`` where a driver's meter reads it."""
    length = BATCHES_OF_PROMPT * (request.num_batch or DEFAULT_BATCH)
    if facts is not None and facts.flash_attention == "disabled":
        length = max(length, LONGEST_PROMPT)
    return min(length, request.context - 8)


def prompts_to_time(prompts: Sequence[int], speeds: Sequence[Speed]) -> Iterator[int]:
    """The prompts to time, one after the other; ``speeds`` are the answers so far.

    A prompt too long for the last one's rate ends it; one that was slow is not repeated.
    """
    seconds = 0.0
    for index, prompt in enumerate(prompts):
        if prompt in prompts[:index] and seconds > REPEAT_BUDGET:
            continue
        if speeds and not _in_budget(speeds[-1], prompt):
            return
        begin = time.monotonic()
        yield prompt
        seconds = time.monotonic() - begin


def repeats_to_time(
    prompts: Sequence[int], speeds: Sequence[Speed], cpu: CpuWatch, clock: Callable[[], float] = time.monotonic
) -> Iterator[int]:
    """The first prompt again and again while its timings differ too much, for two minutes at most.

    Where other processes take the CPU, repeats differ for as long as these run: ten seconds are spent on it then.
    """
    begin = clock()
    while prompts.count(prompts[0]) > 1 and repeats_differ([one for one in speeds if _alike(one, speeds[0])]):
        spent, others = clock() - begin, cpu.by_others() or 0.0
        if spent > (BUSY_BUDGET if others > OTHERS else SPEED_BUDGET):
            return
        yield prompts[0]


def _alike(one: Speed, other: Speed) -> bool:
    return one.prompt_tokens <= SAME_DEPTH * other.prompt_tokens


def _in_budget(last: Speed, prompt: int) -> bool:
    return last.prompt_tokens_per_s is not None and prompt / last.prompt_tokens_per_s <= PROMPT_BUDGET


class CpuWatch:
    """Begins now: the share of this machine's CPU time that others than the engine's processes take from here on."""

    def __init__(self, pids: Callable[[], frozenset[int]]) -> None:
        self._pids = pids
        self._busy, self._total = _machine()
        self._own = _own(pids())

    def by_others(self) -> float | None:
        """From 0 to 1; ``None`` where no time has passed."""
        busy, total = _machine()
        if total <= self._total:
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
