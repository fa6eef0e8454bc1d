"""Progress of a run: bars on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from harness.cli.output import clean
from harness.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress


class Plain:
    """Plain lines, for logs and pipes."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> Self:
        """Nothing to set up."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing to tear down."""

    def rest(self) -> None:
        """Draw nothing from now on; lines are still said."""

    def _line(self, text: str) -> None:
        print(clean(text), file=sys.stderr, flush=True)  # noqa: T201 - progress is this class's output

    def say(self, text: str) -> None:
        """A line."""
        self._line(text)

    def warn(self, text: str) -> None:
        """A warning line."""
        self._line(f"warning: {text}")

    def phase(self, title: str, step: int, steps: int) -> None:
        """A line for each phase."""
        self._line(f"[{step}/{steps}] {title}")

    def progress(self, what: str, done: float, total: float | None) -> None:
        """A line when the word changes; percentages would flood a log."""
        if what != self._last:
            self._last = what
            self._line(f"  {what}")

    def memory(self, now: int | None, peak: int | None) -> None:
        """Too many for a log."""

    def point(self, context: int, num_batch: int | None, total: int | None, note: str | None) -> None:
        """A line for each load."""
        size = "" if total is None else f" {format_size(total)}"
        self._line(f"  {context:>7} tokens:{size}{f'  ({note})' if note else ''}")


class Bars(Plain):
    """A bar over the phases, with the memory now and its peak."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._bars: Progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", justify="left"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[memory]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bars.add_task("starting", total=None, memory="")

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing; the bar disappears."""
        self._bars.stop()

    def rest(self) -> None:
        """The bar disappears: the terminal belongs to somebody else now."""
        self._bars.stop()

    def _line(self, text: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text(clean(text)))

    def phase(self, title: str, step: int, steps: int) -> None:
        """Move the bar."""
        self._bars.update(self._task, description=clean(title), completed=step - 1, total=steps)

    def progress(self, what: str, done: float, total: float | None) -> None:
        """Show a long step's share."""
        share = f" {done / total:.0%}" if total else ""
        self._bars.update(self._task, memory=f"{clean(what)}{share}")

    def memory(self, now: int | None, peak: int | None) -> None:
        """Show the meter."""
        if now is not None:
            self._bars.update(self._task, memory=f"{format_size(now)} (peak {format_size(peak)})")


def watcher(quiet: bool) -> Plain:
    """Bars on a terminal, plain lines elsewhere."""
    return Bars() if sys.stderr.isatty() and not quiet else Plain()
