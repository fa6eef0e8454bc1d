"""Which calibration a command line means."""

from __future__ import annotations

from harness.errors import NotFoundError, UnknownVerdictError
from harness.model.calibration import Calibration
from harness.options import QueryOptions
from harness.prediction.verdict import Source
from harness.store.store import Store, key_of


def select(store: Store, model: str, query: QueryOptions) -> tuple[str, Calibration]:
    """A model's id and calibration: the variant asked for, else that of this machine's GPU, else the default file.

    Raises:
        NotFoundError: there is none. UsageError: several engines have one.
    """
    from harness.serving.calibration_lookup import CalibrationFilter
    from harness.serving.figures import load

    path, calibration = load(model, store, CalibrationFilter.of(query))
    return key_of(calibration, path), calibration


def select_or_estimate(store: Store, model: str, query: QueryOptions) -> tuple[str, Calibration, Source, tuple[str, ...]]:
    """A model's id and calibration at the settings asked for, or an estimate of a header; with its source and what to say.

    Raises:
        NotFoundError: there is neither. UnknownVerdictError: there is one with other settings. UsageError: several engines have
        one. HarnessError: a header that cannot be read.
    """
    from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
    from harness.serving.check import SOURCES, is_address, is_known_hub_name, is_readable
    from harness.serving.figures import load_as_asked

    wanted, free = CalibrationFilter.of(query), query.available
    readable = not query.measured_only and is_readable(model)

    def known() -> tuple[str, Calibration, Source, tuple[str, ...]]:
        found = load_as_asked(model, store, wanted, query.num_parallel, free)
        return found.key, found.calibration, found.source, found.notes

    try:
        if not readable or not is_address(model) or is_known_hub_name(model, store, wanted.engine):
            return known()
    except (NotFoundError, UnknownVerdictError):
        if not readable:
            raise
    from harness.inventory.machine import LocalMachine
    from harness.serving.estimates import estimate

    question = CheckRequest(model=model, context=query.ctx or 1, num_parallel=query.num_parallel)
    found = estimate(question, store, LocalMachine(query.gpu), wanted, free)
    if found is None or found.method is None:
        return known()
    return found.calibration.id, found.calibration, SOURCES[found.method], found.warnings
