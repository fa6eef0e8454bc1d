"""``harness fit``: a record read again, and the calibration that follows from it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.engines.registry import policy_of
from harness.measure.engine_log import read_facts
from harness.model.calibration import Calibration
from harness.model.record import Record
from harness.store.store import read_record


def refit(path: Path) -> tuple[Record, Calibration]:
    """The calibration of a run on disk, from its logs and readings alone."""
    record = reread(path)
    return record, policy_of(record.engine_name).fit(record)


def reread(path: Path) -> Record:
    """A record whose facts are read again from its logs, so that a corrected parser needs no new run."""
    record = read_record(path)
    folder = path if path.is_dir() else path.parent
    policy, loads = policy_of(record.engine_name), []
    for load in record.loads:
        log = folder / Path(load.log).name if load.log else None  # of this run, whatever a record of others names
        if log is not None and log.is_file():
            load = msgspec.structs.replace(load, facts=read_facts(log, load.log_start, load.log_end, policy))
        loads.append(load)
    return msgspec.structs.replace(record, loads=tuple(loads))
