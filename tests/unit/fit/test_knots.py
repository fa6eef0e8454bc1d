"""Compute buffers that an engine has planned: exact at every context, in few plans."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from harness.fit.constants import fit_record
from harness.fit.knots import first_contexts, missing, pieces
from harness.model.facts import DeviceFacts, LoadFacts
from harness.model.record import Load, LoadRequest, Machine, Record
from harness.prediction.memory import predict
from harness.units import MIB
from tests.support.records import record
from tests.support.true_model import TrueModel

TOP = 131_072


def planned(compute: Callable[[int], float], least: int = 512) -> dict[int, float]:
    """The plans that are asked for, of a function of the context."""
    known: dict[int, float] = {}
    wanted = first_contexts(least, TOP)
    while wanted:
        known |= {context: round(compute(context) / MIB, 2) * MIB for context in wanted}
        wanted = missing(list(known.items()))
    return known


def cast(context: int) -> float:
    """Masks of 512 rows; activations of 6 MiB above copies that grow by 512 bytes a token (qwen2, 14 heads, an f32 cache)."""
    return 1024 * context + max(15 * MIB, 10 * MIB + 512 * context)


def stepped(context: int) -> float:
    """A buffer that fills a gap up to 32,768 tokens, and another up to 49,152, and is on top from there (cohere2)."""
    return 4096 * context + 8 * MIB * (context > 32_768) + 8 * MIB * (context > 49_152) + 512 * max(context - 32_768, 0)


def falling(context: int) -> float:
    """Less is left between the buffers beyond 7,168 tokens (qwen2, 24 layers)."""
    return 1024 * context + 3 * MIB * (3584 < context <= 7168) + max(0, context - 54_600) * 512


@pytest.mark.parametrize("compute", [cast, stepped, falling])
def test_every_context_is_known_from_few_plans(compute: Callable[[int], float]) -> None:
    known = planned(compute)
    found = pieces(list(known.items()))
    assert len(known) <= 48, "a plan takes a second of a large model"
    assert len(found) <= 8
    for context in range(512, TOP + 1, 256):
        piece = next(piece for piece in found if context <= piece.end)
        assert abs(piece.line.at(context) - compute(context)) <= piece.doubt <= 0.5 * MIB, context


def test_a_line_of_two_plans_is_in_doubt() -> None:
    (one,) = pieces([(512, 0.0), (TOP, 64.0 * MIB)])
    (sure,) = pieces([(512, 0.0), (65_792, 32.0 * MIB), (TOP, 64.0 * MIB)])
    assert one.doubt > 10 * sure.doubt


class Cast(TrueModel, frozen=True, kw_only=True):
    """f16 copies of one layer, window or not, beside the activations of a batch."""

    def compute(self, context: int, batch: int) -> int:
        window = self.window_cells(context, batch)
        copies = max(1024 * context, 2048 * window if self.window else 0)
        return batch * 2 * (context + window) + max(15 * MIB, 6 * MIB + copies)

    def load(self, request: LoadRequest, slots: int = 1) -> Load:
        load = super().load(request, slots)
        assert load.facts is not None
        return msgspec.structs.replace(load, facts=msgspec.structs.replace(load.facts, kv_cache_type="f32"))


def run(model: Cast, *, plans: bool) -> Record:
    loads = [model.load(LoadRequest(context=context, num_batch=512)) for context in (2048, 4096, 8192)]
    known = planned(lambda context: model.compute(context, 512)) if plans else {}
    buffers = [
        Load(
            request=LoadRequest(context=context, num_batch=512, purpose="buffers"),
            outcome="ok",
            facts=LoadFacts(
                engine="llama-server", dialect="llama.cpp", devices={"CPU": DeviceFacts(kind="host", compute_bytes=round(size))}
            ),
        )
        for context, size in known.items()
    ]
    host = Machine(target="host", sandbox="process", meter="host")
    made = record(*loads, *buffers, train=TOP)
    return msgspec.structs.replace(made, machine=host, model=msgspec.structs.replace(made.model, layers=2))


PLAIN = Cast(weights=60 * MIB, overhead=30 * MIB, kv_per_cell=4096, cell_bytes=52)
WINDOW = Cast(weights=60 * MIB, overhead=30 * MIB, kv_per_cell=2048, window=4096, window_per_cell=6144, cell_bytes=52)


@pytest.mark.parametrize("model", [PLAIN, WINDOW], ids=["plain", "window"])
def test_an_f32_cache_is_predicted_far_beyond_the_loads_from_plans(model: Cast) -> None:
    calibration = fit_record(run(model, plans=True))
    assert calibration.metadata.quality.valid_to == TOP
    assert [load.context for load in calibration.metadata.quality.loads] == [2048, 4096, 8192], "plans are no loads"
    for context in (512, 1024, 3072, 4352, 4608, 4864, 8192, 9216, 33_024, 65_536, TOP):
        said, truth = predict(calibration, context), model.truth(context, 512)
        assert abs(said.total_bytes - truth) <= min(said.uncertainty_bytes, 0.002 * truth), context
        assert said.uncertainty_bytes <= 0.015 * truth


def test_without_plans_the_copies_may_still_come() -> None:
    model = msgspec.structs.replace(PLAIN, weights=400 * MIB)
    sure, unsure = (predict(fit_record(run(model, plans=plans)), TOP) for plans in (True, False))
    assert unsure.uncertainty_bytes > 5 * sure.uncertainty_bytes
    assert abs(unsure.total_bytes - model.truth(TOP, 512)) <= unsure.uncertainty_bytes


def test_plans_that_would_begin_below_nothing_are_not_taken() -> None:
    """A model of a few megabytes with steep scores: no base may be below zero."""
    model = msgspec.structs.replace(PLAIN, weights=MIB, overhead=0)
    made = run(model, plans=True)
    steep = [
        msgspec.structs.replace(load, facts=msgspec.structs.replace(load.facts, devices={
            "CPU": DeviceFacts(kind="host", compute_bytes=load.request.context**2)}))
        if load.request.purpose == "buffers" and load.facts is not None else load
        for load in made.loads
    ]  # fmt: skip
    assert all(band.base_vram_gb >= 0 for band in fit_record(msgspec.structs.replace(made, loads=tuple(steep))).metadata.bands)
