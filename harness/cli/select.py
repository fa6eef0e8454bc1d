"""Which calibration a command line means."""

from __future__ import annotations

from harness.model.calibration import Calibration
from harness.options import QueryOptions
from harness.store.store import Store


def select(store: Store, model: str, query: QueryOptions) -> Calibration:
    """The calibration of a model: the variant asked for, else that of this machine's GPU, else the default file.

    Raises:
        NotFoundError: there is none. UsageError: several engines have one.
    """
    from harness.serving.calibration_lookup import CalibrationFilter, load

    return load(model, store, CalibrationFilter.of(query))
