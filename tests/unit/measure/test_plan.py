"""The plan of a calibration: a function of what was asked and of the engine's version."""

from __future__ import annotations

from harness.engines.base import Options, Source
from harness.engines.registry import policy_of
from harness.measure.plan import CalibrationPlan, Request, plan_calibration
from harness.model.record import Model
from harness.units import MIB

SOURCE = Source(model=Model(name="m", train_context=131_072), projector_bytes=100 * MIB)


def planned(version: str | None, **asked: object) -> CalibrationPlan:
    request = Request(**{"name": "m", "stem": "m", "source": SOURCE, **asked})  # type: ignore[arg-type]
    return plan_calibration(policy_of("ollama"), request, Options(), version)


def test_batches_and_reserve_follow_the_engines_version() -> None:
    new, old = planned("0.33.0"), planned("0.24.0")
    assert (new.reserve_bytes, old.reserve_bytes) == ((1024 + 100) * MIB, 457 * MIB)
    assert ({load.num_batch for load in new.loads}, {load.num_batch for load in old.loads}) == ({512, 1024, 2048}, {512})


def test_an_engine_of_an_unknown_version_is_planned_as_the_newest() -> None:
    assert planned(None) == planned("0.33.0")


def test_a_batch_that_was_asked_for_is_recorded_and_used_by_every_load() -> None:
    plan = planned("0.33.0", num_batch=256)
    assert plan.settings.num_batch == 256
    assert {load.num_batch for load in plan.loads} == {256}
