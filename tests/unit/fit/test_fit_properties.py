"""Whatever a model's constants are, loads give them back, and predictions hold where nothing was loaded."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UntrustedError
from harness.fit.constants import fit_record
from harness.fit.load_plan import MAX_LOADS
from harness.fit.observations import points_of
from harness.model.facts import DeviceFacts
from harness.model.record import Load, Record
from harness.prediction.memory import predict
from harness.units import GIB, MIB
from tests.support.true_model import GPU, MODELS, SMALLEST, TrueModel

OLLAMA = ((4096, 512), (32768, 1024), (1 << 31, 2048))
#: The log's rounding, far out along the context.
LOG = 0.3 * MIB


def batch_of(context: int) -> int:
    return next(batch for limit, batch in OLLAMA if context <= limit)


@given(model=MODELS, context=st.integers(SMALLEST, 131_072), slots=st.integers(1, 8))
def test_one_batch_holds_at_every_context_and_number_of_slots(model: TrueModel, context: int, slots: int) -> None:
    context = min(context, model.train_context)
    calibration = fit_record(model.run())
    truth = model.truth(context, 512, slots)
    assert predict(calibration, context, slots).total_bytes == pytest.approx(truth, rel=1e-4, abs=LOG * slots)


@given(model=MODELS, context=st.integers(SMALLEST, 131_072))
def test_bands_hold_where_the_engine_changes_its_batch(model: TrueModel, context: int) -> None:
    context = min(context, model.train_context)
    calibration = fit_record(model.run(OLLAMA))
    truth = model.truth(context, batch_of(context))
    assert predict(calibration, context).total_bytes == pytest.approx(truth, rel=1e-4, abs=2 * LOG)
    ends = [band.up_to for band in calibration.metadata.bands]
    assert ends == sorted(set(ends))
    assert ends[-1] == calibration.metadata.quality.valid_to == model.train_context


@given(model=MODELS, slots=st.integers(1, 8), wanted=st.integers(1, 8), context=st.integers(SMALLEST, 131_072))
def test_loads_of_several_slots_predict_any_other_number(model: TrueModel, slots: int, wanted: int, context: int) -> None:
    context = min(context, model.train_context)
    calibration = fit_record(model.run(slots=slots))
    truth = model.truth(context, 512, wanted)
    assert predict(calibration, context, wanted).total_bytes == pytest.approx(truth, rel=1e-4, abs=LOG * wanted)


@given(model=MODELS)
def test_the_parts_are_the_ones_that_made_the_loads(model: TrueModel) -> None:
    calibration = fit_record(model.run())
    constants, parts = calibration.constants, calibration.metadata.breakdown_gb
    _, window = model.caches(model.train_context, 512)
    assert constants.kv_cache_gb_per_10k == pytest.approx(model.kv_per_cell * 10_000 / GIB, rel=1e-3, abs=2e-5)
    assert constants.compute_gb_per_10k == pytest.approx(512 * model.row() * 10_000 / GIB, rel=1e-3, abs=2e-5)
    assert parts.fixed_cache == pytest.approx((window + model.recurrent) / GIB, rel=1e-3, abs=5e-5)
    assert parts.overhead == pytest.approx(model.overhead / GIB, abs=5e-5)
    assert parts.weights == pytest.approx(model.weights / GIB, abs=2e-5)
    whole = round((parts.weights or 0) + (parts.fixed_cache or 0) + (parts.compute or 0) + (parts.overhead or 0.0), 6)
    assert whole == constants.base_vram_gb


@given(model=MODELS)
def test_an_error_that_is_claimed_is_one_that_was_found(model: TrueModel) -> None:
    quality = fit_record(model.run()).metadata.quality
    assert quality.max_error is not None
    assert quality.max_error <= 1e-3
    assert len(quality.loads) <= MAX_LOADS


def _more(part: str) -> Callable[[DeviceFacts, int], DeviceFacts]:
    def change(device: DeviceFacts, size: int) -> DeviceFacts:
        return msgspec.structs.replace(device, **{part: (getattr(device, part) or 0) + size})

    return change


@given(
    model=MODELS,
    which=st.integers(0, 4),
    part=st.sampled_from(["weights_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes", "measured"]),
    sign=st.sampled_from([-1, 1]),
)
def test_one_figure_that_is_wrong_is_noticed(model: TrueModel, which: int, part: str, sign: int) -> None:
    """A lost cache line, a second user of the GPU, a load that kept something elsewhere: never a silent constant."""
    run = model.run(OLLAMA)
    which = min(which, len(run.loads) - 1)
    load = run.loads[which]
    assert load.facts is not None
    assert load.busy is not None
    most = max(one.busy.total_bytes or 0 for one in run.loads if one.busy)
    size = sign * (most // 50 + 17 * MIB)
    device = load.facts.devices[GPU]
    if part != "measured" and (getattr(device, part) or 0) + size < 0:
        size = -size
    changed: Load
    if part == "measured":
        changed = msgspec.structs.replace(
            load, busy=msgspec.structs.replace(load.busy, total_bytes=(load.busy.total_bytes or 0) + size)
        )
    else:
        facts = msgspec.structs.replace(load.facts, devices={GPU: _more(part)(device, size)})
        changed = msgspec.structs.replace(load, facts=facts)
    run = msgspec.structs.replace(run, loads=(*run.loads[:which], changed, *run.loads[which + 1 :]))
    if part == "weights_bytes" and size < 0:
        notes = left_out(run)
        assert any(note.startswith(f"context {load.request.context:,}: not a point") for note in notes)
        return
    with pytest.raises(UntrustedError):
        fit_record(run)


def left_out(run: Record) -> tuple[str, ...]:
    """Notes of a fit in which a load may have been left out; too few loads say nothing wrong."""
    try:
        return fit_record(run).metadata.quality.notes
    except UntrustedError:
        return tuple(points_of(run)[1])
