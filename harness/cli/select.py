"""Which calibration a command line means."""

from __future__ import annotations

from harness.errors import NotFoundError
from harness.model.calibration import Calibration
from harness.options import QueryOptions
from harness.store.store import Store, key_of


def select(store: Store, model: str, query: QueryOptions) -> tuple[str, Calibration]:
    """A model's id and calibration: the variant asked for, else that of this machine's GPU, else the default file.

    Raises:
        NotFoundError: there is none. UsageError: several engines have one.
    """
    from harness.serving.calibration_lookup import CalibrationFilter, load

    path, calibration = load(model, store, CalibrationFilter.of(query))
    return key_of(calibration, path), calibration


def select_or_estimate(store: Store, model: str, query: QueryOptions) -> tuple[str, Calibration, str, tuple[str, ...]]:
    """The same, or an estimate where a header can be read; with its source and what to say of it.

    Raises:
        NotFoundError: there is neither. UsageError: several engines have one. HarnessError: a header that cannot be read.
    """
    from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
    from harness.serving.check import SOURCES, is_address, is_known_hub_name, is_readable

    wanted = CalibrationFilter.of(query)
    readable = not query.measured_only and is_readable(model)
    try:
        if not readable or not is_address(model) or is_known_hub_name(model, store, wanted.engine):
            return *select(store, model, query), "measured", ()
    except NotFoundError:
        if not readable:
            raise
    from harness.inventory.machine import LocalMachine
    from harness.serving.estimates import estimate

    question = CheckRequest(model=model, context=query.ctx or 1, num_parallel=query.num_parallel)
    found = estimate(question, store, LocalMachine(query.gpu), wanted, query.available)
    if found is None or found.method is None:
        return *select(store, model, query), "measured", ()
    return found.calibration.id, found.calibration, SOURCES[found.method], found.warnings
