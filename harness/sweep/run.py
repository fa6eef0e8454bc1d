"""``harness sweep``: many calibrations from one plan; each is on disk when it ends, and none stops the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.errors import BadInputError, HarnessError, NotFoundError
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.store.store import Store, write_atomically
from harness.store.yaml import read_yaml
from harness.sweep.matrix import Cell, read_plan

SWEEPS: Final = "sweeps"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a cell failed, as ``--json`` has it."""

    code: str
    message: str
    hint: str | None
    exit_code: int


class CellOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a cell ended. ``artifact`` and ``record`` are paths in the store; ``node`` is where a cluster ran it."""

    cell: Cell
    status: Literal["done", "failed"]
    started_at: str
    seconds: float
    artifact: str | None = None
    record: str | None = None
    problem: Problem | None = None
    node: str | None = None


class Sweep:
    """A plan, and what is known of its cells in a store (``<store>/sweeps/<plan>/<cell>.json``)."""

    def __init__(self, plan: Path, store: Store, *, here: bool) -> None:
        self.cells = load_plan(plan, here=here)
        self.store = store
        self._folder = store.root / SWEEPS / plan.stem

    def outcome(self, cell: Cell) -> CellOutcome | None:
        """How a cell ended in an earlier call; ``None`` where it has not, or its file is damaged or gone."""
        found = _read(self._folder / f"{cell.key}.json")
        gone = found is not None and found.artifact is not None and not Path(found.artifact).is_file()
        return None if gone else found

    def pending(self, *, resume: bool) -> tuple[Cell, ...]:
        """The cells to run: all of them, or those that are not done yet."""
        if not resume:
            return self.cells
        return tuple(cell for cell in self.cells if (found := self.outcome(cell)) is None or found.status != "done")

    def keep(self, outcome: CellOutcome) -> None:
        """Write how a cell ended."""
        public = msgspec.structs.replace(outcome, cell=outcome.cell.public())
        data = msgspec.json.format(msgspec.json.encode(public), indent=1) + b"\n"
        write_atomically(self._folder / f"{outcome.cell.key}.json", data)

    def estimate(self, cells: Sequence[Cell]) -> float | None:
        """Seconds that cells took on average in this store, times their number; ``None`` where none has run yet."""
        known = map(_read, self._folder.glob("*.json"))
        spent = [found.seconds for found in known if found is not None and found.status == "done"]
        return len(cells) * sum(spent) / len(spent) if spent else None


def _read(path: Path) -> CellOutcome | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=CellOutcome)
    except (OSError, msgspec.DecodeError):
        return None


def load_plan(path: Path, *, here: bool) -> tuple[Cell, ...]:
    """The cells of a plan file.

    Raises:
        NotFoundError: no such file. NotPermittedError: it may not be read. BadInputError: not YAML, or no plan.
    """
    try:
        document = read_yaml(path)
    except NotFoundError as error:
        raise NotFoundError(f"no such plan: {path}", code="no-such-file") from error
    except BadInputError as error:
        raise BadInputError(error.message, code="bad-plan") from error
    return read_plan(document, str(path), here=here)


def run_cell(cell: Cell, store: Store, here: Path, observer: Observer) -> CellOutcome:
    """Calibrate one cell on this machine. Never raises for a calibration that fails, a bug of harness included."""
    started, began = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", time.monotonic()
    artifact = record = problem = None
    try:
        result = prepare(cell.run_options(), store, here).calibrate(observer)
        artifact, record = str(result.artifact), str(result.record)
    except HarnessError as error:
        problem = Problem(code=error.code, message=error.message, hint=error.hint, exit_code=error.exit_code)
    except Exception as error:  # noqa: BLE001 - one broken cell stops no other; the summary says so
        problem = Problem(code="bug", message=f"a bug in harness: {error!r}", hint=None, exit_code=1)
    return CellOutcome(
        cell=cell,
        status="failed" if problem else "done",
        started_at=started,
        seconds=round(time.monotonic() - began, 3),
        artifact=artifact,
        record=record,
        problem=problem,
    )


def refuse_cells(cells: Sequence[Cell], store: Store, here: Path) -> None:
    """Refuse a plan of which a cell would be refused on this machine before its first load.

    Raises:
        HarnessError: as the calibration would raise it; the message names the cell.
    """
    for cell in cells:
        try:
            session = prepare(cell.run_options(), store, here)
            with session.held:
                session.refuse()
        except HarnessError as error:
            error.message = f"{cell.title}: {error.message}"
            raise


#: Runs cells, in any order, and yields each outcome as it comes.
CellRunner = Callable[[Sequence[Cell]], Iterator[CellOutcome]]


def one_after_another(store: Store, here: Path, observer: Observer) -> CellRunner:
    """On this machine, one cell at a time: a GPU is measured by one."""

    def run(cells: Sequence[Cell]) -> Iterator[CellOutcome]:
        for cell in cells:
            observer.say(cell.title)
            yield run_cell(cell, store, here, observer)

    return run


def run_sweep(sweep: Sweep, cells: Sequence[Cell], runner: CellRunner, observer: Observer) -> tuple[CellOutcome, ...]:
    """Run cells; every outcome is kept at once, so that an interruption loses only what was running."""
    found = []
    done = len(sweep.cells) - len(cells)
    for outcome in runner(cells):
        sweep.keep(outcome)
        found.append(outcome)
        done += 1
        said = f"done in {outcome.seconds:.0f} s" if outcome.problem is None else f"failed: {outcome.problem.message}"
        observer.say(f"[{done}/{len(sweep.cells)} cells] {outcome.cell.title}: {said}")
    return tuple(found)
