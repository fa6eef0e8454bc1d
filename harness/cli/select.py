"""Which calibration a command line means."""

from __future__ import annotations

import shlex

from harness.core.calibration import Calibration
from harness.errors import NotFoundError
from harness.store import Store


def select(store: Store, model: str, engine: str | None, variant: str | None) -> Calibration:
    """The calibration of a model: the variant asked for, else the default file, else the only one there is.

    Raises:
        NotFoundError: there is none. UsageError: several engines have one.
    """
    found = store.find(model, engine)
    if variant is not None:
        wanted = [one for path, one in found if path.stem.endswith(f"@{variant}")]
        if not wanted:
            raise NotFoundError(f"{model} has no variant {variant!r} in {store.root}", code="no-calibration")
        return wanted[0]
    plain = [one for path, one in found if "@" not in path.stem]
    if plain:
        return plain[0]
    if len(found) == 1:
        return found[0][1]
    if found:
        names = ", ".join(path.stem.split("@", 1)[1] for path, _ in found)
        raise NotFoundError(f"{model} has only variants: {names}", hint="choose one with --variant", code="only-variants")
    raise NotFoundError(
        f"{model} is not calibrated in {store.root}",
        hint=f"harness calibrate {shlex.quote(model)}",
        code="no-calibration",
    )
