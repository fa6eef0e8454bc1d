"""``harness report``: the calibrations of a store, and the records of their runs, as one page."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError, UnavailableError
from harness.installation import install_hint
from harness.report.page import Assets, DriftLine, ReportEntry, page
from harness.store.store import Store, read_record, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.maintain.diff import Pair


def entries_of(store: Store, warn: Callable[[str], None]) -> tuple[ReportEntry, ...]:
    """Every calibration that can be read, with its run's record where it is there."""
    found = []
    for one in store.entries(warn):
        record = None
        if one.calibration.metadata.run is not None:
            try:
                record = read_record(store.run_folder(one.calibration.metadata.run))
            except HarnessError:
                record = None  # runs are kept out of repositories; the page does without its trace
        found.append(ReportEntry(key=one.key, calibration=one.calibration, record=record))
    return tuple(found)


def assets() -> Assets:
    """The page's own files, and the plotting library's.

    Raises:
        UnavailableError: plotly is not installed.
    """
    here = files("harness.report") / "assets"
    try:
        plotly = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UnavailableError(
            "the report's charts need plotly",
            hint=install_hint("report"),
            code="no-plotly",
        ) from error
    return Assets(
        css=(here / "page.css").read_text(encoding="utf-8"),
        scripts=tuple((here / name).read_text(encoding="utf-8") for name in ("planner.js", "page.js")),
        plotly=plotly,
    )


def drift_lines(pairs: list[Pair], words: Callable[[Pair], tuple[str, tuple[str, ...]]]) -> tuple[DriftLine, ...]:
    """The drift between two stores, in the words of ``harness diff``."""
    found = []
    for pair in pairs:
        status, lines = words(pair)
        found.append(DriftLine(key=pair.key, status=status, lines=lines))
    return tuple(found)


def write_report(
    store: Store, target: Path, warn: Callable[[str], None], *, drift: tuple[DriftLine, ...] = (), against: str | None = None
) -> int:
    """Write the page; how many calibrations it shows.

    Raises:
        UnavailableError: plotly is not installed. CannotWriteError: the file.
    """
    entries = entries_of(store, warn)
    days = sorted(entry.calibration.metadata.calibrated_at[:10] for entry in entries)
    span = f", measured {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    subtitle = f"{len(entries)} calibration{'' if len(entries) == 1 else 's'}{span}. 1 GiB is 2³⁰ bytes."
    write_atomically(target, page(entries, assets(), subtitle=subtitle, drift=drift, against=against).encode())
    return len(entries)
