"""Which calibration a name means, and what it says at other settings, whatever is free here."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec

from harness.engines.registry import policy_of
from harness.errors import NotFoundError, UnknownVerdictError
from harness.inventory.machine import LocalMachine
from harness.inventory.weights import Identity, calibrations_of, identify
from harness.model.calibration import Calibration
from harness.prediction.forced import NOTHING
from harness.prediction.settings import AskedSettings, derive
from harness.prediction.verdict import Source
from harness.serving.advice import calibrating
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest, differs, is_derived, is_exact, pick
from harness.store.store import Store, key_of


def load(
    model: str, store: Store, wanted: CalibrationFilter | None = None, available: tuple[int, ...] | None = None
) -> tuple[Path, Calibration]:
    """The calibration of a model (a catalog name, an id, a path) that holds here; where it is the only one, it is taken.

    ``available``: of a card that is not here. One with other settings than ``wanted`` is taken where none has them.

    Raises:
        NotFoundError: there is none. UsageError: several engines have the model. BadInputError, ConfigError: damaged, newer.
    """
    wanted = wanted or CalibrationFilter()
    files = calibrations_of(store, model, wanted.engine)
    question, machine = CheckRequest(model=model, context=1), LocalMachine()
    found = pick(question, store, machine, wanted, available)
    if wanted.asked != AskedSettings() and (isinstance(found, str) or not is_exact(found[1], wanted)):
        found = pick(question, store, machine, wanted, ())  # a variant of these settings, of whatever card
    if not isinstance(found, str):
        return found
    if len(files) == 1 and wanted.variant is None:
        return files[0]
    hint = None if files else calibrating(model, wanted, store)
    raise NotFoundError(found, hint=hint, code="only-variants" if files else "no-calibration")


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration at the settings of a question, with the id of its file; ``notes`` say what was calculated for them."""

    key: str
    calibration: Calibration
    source: Source
    notes: tuple[str, ...]


def load_as_asked(
    model: str, store: Store, wanted: CalibrationFilter, num_parallel: int, available: tuple[int, ...] | None = None
) -> Loaded:
    """:func:`load`, as the calibration holds for the settings that are asked for.

    Raises:
        UnknownVerdictError: they do not follow from what was measured, or the weights are others. UsageError: more slots than
            the engine can have. Otherwise as :func:`load`.
    """
    path, calibration = load(model, store, wanted, available)
    identity = identify(model, calibration)
    if identity not in get_args(Identity):
        raise UnknownVerdictError(identity, code="other-weights")
    return as_asked(calibration, wanted, num_parallel, key_of(calibration, path), model, store)


def as_asked(
    calibration: Calibration,
    wanted: CalibrationFilter,
    num_parallel: int,
    key: str,
    model: str | None = None,
    store: Store | None = None,
) -> Loaded:
    """A calibration, filed under ``key``, at the settings of a question.

    Raises:
        UnknownVerdictError: they do not follow from what was measured. UsageError: more slots than the engine can have.
    """
    policy = policy_of(calibration.engine)
    policy.check_slots(num_parallel)
    asked = msgspec.structs.replace(wanted.asked, num_parallel=num_parallel, placed=wanted.forced != NOTHING)
    at = derive(calibration, asked, ggml_caches=policy.ggml_caches)
    if at.obstacles:
        hint = calibrating(model or calibration.metadata.model.name, wanted, store)
        raise UnknownVerdictError(differs(key, at.obstacles), hint=hint, code="other-settings")
    return Loaded(
        key=key, calibration=at.calibration, notes=tuple(f"derived: {one}" for one in at.derived),
        source="derived" if at.derived or is_derived(calibration, num_parallel) else "measured",
    )  # fmt: skip
