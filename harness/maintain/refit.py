"""``harness fit``: a record read again, and the calibration that follows from it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.engines.registry import policy_of
from harness.errors import BadInputError
from harness.measure.engine_log import read_facts
from harness.model.calibration import Calibration, to_document
from harness.model.record import Record
from harness.model.validation import from_document
from harness.store.run_folder import is_plain
from harness.store.store import read_record
from harness.text import one_line


def refit(path: Path) -> tuple[Record, Calibration]:
    """The calibration of a run on disk, from its logs and readings alone.

    Raises:
        BadInputError: its figures contradict each other. UntrustedError: no line can be drawn through them.
    """
    record = reread(path)
    return record, fitted(record, str(path))


def fitted(record: Record, where: str) -> Calibration:
    """The constants of a record that others may have written.

    Raises:
        BadInputError: its figures contradict each other. UntrustedError: no line can be drawn through them.
    """
    try:
        calibration = policy_of(record.engine_name).fit(record)
    except (ArithmeticError, ValueError, LookupError) as error:
        raise BadInputError(f"{where} contradicts itself: {one_line(repr(error))}", code="bad-record") from error
    return from_document(to_document(calibration), where)


def reread(path: Path) -> Record:
    """A record whose facts are read again from its logs, so that a corrected parser needs no new run."""
    record = read_record(path)
    folder = path if path.is_dir() else path.parent
    policy, loads = policy_of(record.engine_name), []
    for load in record.loads:
        log = folder / Path(load.log).name if load.log else None  # of this run, whatever a record of others names
        if log is not None and is_plain(log):
            load = msgspec.structs.replace(load, facts=read_facts(log, load.log_start, load.log_end, policy))
        loads.append(load)
    return msgspec.structs.replace(record, loads=tuple(loads))
