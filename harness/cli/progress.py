"""Progress of a run: a live line on a terminal, plain lines elsewhere; always on stderr.

Each measured load stays on the screen as a line of its own, with the straight line through the loads so far.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from harness.measure.events import Observer
from harness.text import clean
from harness.units import KIB, format_size

if TYPE_CHECKING:
    from rich.progress import Progress

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
#: Readings in the curve of memory, the seconds between them, and the columns that a terminal must have for it and for the bar.
_CURVE: Final = 16
_TICK: Final = 0.2
_WIDE: Final = 100
_MEDIUM: Final = 72


class PlainProgress(Observer):
    """Plain lines, for logs and pipes."""

    def __init__(self) -> None:
        self.repeated: Callable[[str], str] = str
        self._last = ""
        self._points: dict[int | None, dict[int, int]] = {}
        self._short = False

    def __enter__(self) -> Self:
        """Nothing to set up."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to tear down."""

    def rest(self) -> None:
        """Draw nothing from now on; lines are still said."""

    def _line(self, text: str, style: str = "") -> None:
        print(clean(text), file=sys.stderr, flush=True)  # noqa: T201 - progress is this class's output

    def say(self, text: str) -> None:
        """A line."""
        self._line(text)

    def warn(self, text: str) -> None:
        """A warning line."""
        self._line(f"warning: {self.repeated(text)}", "yellow")

    def phase(self, title: str, step: int, steps: int) -> None:
        """A line for each phase."""
        self._last = ""
        if step <= 1:
            self._points = {}
        self._line(f"[{step}/{steps}] {title}")

    def progress(self, what: str, done: float, total: float | None) -> None:
        """A line when the word changes; percentages would flood a log."""
        if what != self._last:
            self._last = what
            self._line(f"  {what}")

    def memory(self, now: int | None, peak: int | None) -> None:
        """Too many for a log."""

    def point(self, context: int, num_batch: int | None, total: int | None, note: str | None) -> None:
        """A line for each load, and the line through those of its batch so far."""
        size = "" if total is None else f" {format_size(total):>10}"
        batch = "" if num_batch is None or self._short else f" at batch {num_batch:,}"
        if note is not None or total is None:
            self._line(f"  {context:>9,} tokens{batch}{size}  ({note or 'not measured'})", "yellow")
            return
        found = self._points.setdefault(num_batch, {})
        found[context] = total
        self._line(f"  {context:>9,} tokens{batch}{size}  {_line_so_far(found)}".rstrip(), "bold")


class Live(PlainProgress):
    """One line that lives: phase, memory now and at its peak, time; what was measured stays above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        width = self._console.width
        columns = [SpinnerColumn(), TextColumn("[bold]{task.description}", markup=True)]
        columns += [BarColumn(bar_width=16)] if width >= _WIDE else []
        columns += [MofNCompleteColumn()]
        columns += [TextColumn("[cyan]{task.fields[curve]}")] if width >= _MEDIUM else []
        columns += [TextColumn("{task.fields[memory]}", markup=False), TimeElapsedColumn()]
        self._bars: Progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._bars.add_task("starting", total=None, memory="", curve="")
        self._recent: deque[int] = deque(maxlen=_CURVE)
        self._moved = 0.0
        self._short = width < _MEDIUM

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing; the live line disappears."""
        self._bars.stop()

    def rest(self) -> None:
        """The bar disappears: the terminal belongs to the command now."""
        self._bars.stop()

    def _line(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._bars.console.print(Text(clean(text), style=style))

    def phase(self, title: str, step: int, steps: int) -> None:
        """Move the bar, and begin a new curve."""
        if step <= 1:
            self._points = {}
        self._recent.clear()
        name = clean(title).replace("[", "\\[")
        self._bars.update(self._task, description=name, completed=max(step - 1, 0), total=steps, memory="", curve="")

    def progress(self, what: str, done: float, total: float | None) -> None:
        """Show a long step's share."""
        share = f" {done / total:.0%}" if total else ""
        self._bars.update(self._task, memory=f"{clean(what)}{share}", curve="")

    def memory(self, now: int | None, peak: int | None) -> None:
        """Show the meter."""
        if now is None:
            return
        if self._recent and time.monotonic() - self._moved < _TICK:
            self._recent[-1] = now
        else:
            self._recent.append(now)
            self._moved = time.monotonic()
        text = format_size(now) if self._short else f"{format_size(now)} (peak {format_size(peak)})"
        self._bars.update(self._task, memory=text, curve=curve(list(self._recent), peak or now))


def curve(sizes: list[int], peak: int) -> str:
    """Readings as blocks, from nothing at the bottom to the peak at the top."""
    scale = (len(_BLOCKS) - 1) / peak if peak else 0.0
    return "".join(_BLOCKS[min(round(size * scale), len(_BLOCKS) - 1)] for size in sizes).rjust(_CURVE)


def _line_so_far(found: dict[int, int]) -> str:
    if len(found) < 2:
        return ""
    from harness.fit.lines import fit_line

    line = fit_line([(float(context), float(total)) for context, total in found.items()])
    return f"= {format_size(line.start)} + {line.slope / KIB:.3f} KiB/token"


class Quiet(PlainProgress):
    """Warnings alone."""

    def _line(self, text: str, style: str = "") -> None:
        if text.startswith("warning: "):
            super()._line(text, style)


def watcher(quiet: bool) -> PlainProgress:
    """A live line on a terminal that can draw one, plain lines elsewhere; warnings alone with ``-q``."""
    import click

    from harness.cli.context import is_quiet, repeated

    drawn = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not quiet
    watch = Quiet() if is_quiet() else Live() if drawn else PlainProgress()
    if (context := click.get_current_context(silent=True)) is not None:
        watch.repeated = repeated(context)
    return watch
