"""Which calibration a command line means."""

from __future__ import annotations

from harness.model.calibration import Calibration
from harness.store.store import Store


def select(store: Store, model: str, engine: str | None, variant: str | None) -> Calibration:
    """The calibration of a model: the variant asked for, else that of this machine's GPU, else the default file.

    Raises:
        NotFoundError: there is none. UsageError: several engines have one.
    """
    from harness.api import load_calibration

    return load_calibration(model, engine=engine, variant=variant, store=store.root)
