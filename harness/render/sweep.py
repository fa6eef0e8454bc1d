"""A sweep for people: what it would run, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.text import clean, counted

if TYPE_CHECKING:
    from harness.sweep.run import Problem


def planned(titles: Sequence[str], total: int, loads: int, seconds: float | None) -> Iterator[str]:
    """The cells that would run, of ``total``, and how long they may take."""
    for title in titles:
        yield f"  {clean(title)}"
    spent = "how long is not known before one has run" if seconds is None else f"about {seconds / 60:.0f} minutes"
    yield f"{len(titles)} of {total} cells, at least {counted(loads, 'load')}: {spent}"


def summary(failed: Sequence[tuple[str, Problem]], ran: int, total: int) -> Iterator[str]:
    """How many cells ended well, and why the others did not."""
    was = f", {total - ran} were done before" if total > ran else ""
    yield f"{counted(ran - len(failed), 'cell')} done, {len(failed)} failed{was}"
    for title, problem in failed:
        yield f"  {clean(title)}"
        yield f"    {clean(problem.message)}"
        if problem.hint:
            yield f"    {clean(problem.hint)}"
    if failed:
        yield "run the failed ones again with --resume"
