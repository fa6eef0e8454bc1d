"""Which speeds are worth their time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

from harness.core.record import Speed

#: A prompt that would take longer than this to read is not timed, seconds (a software GPU reads a few tokens a second).
PROMPT_BUDGET: Final = 60.0
#: A timing that took longer than this is not repeated, seconds.
REPEAT_BUDGET: Final = 5.0


def worth_timing(prompts: Sequence[int], speeds: Sequence[Speed]) -> Iterator[int]:
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


def _in_budget(last: Speed, prompt: int) -> bool:
    return last.prompt_tokens_per_s is not None and prompt / last.prompt_tokens_per_s <= PROMPT_BUDGET
