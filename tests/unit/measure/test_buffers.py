"""Plans of compute buffers beyond the loads: only where the plans of the loads are what these were."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.engines.base import Options, Source
from harness.headers import planning
from harness.measure.buffers import MOST_PLANS, buffers_of, planner_of
from harness.model.facts import CacheFacts, DeviceFacts, LoadFacts
from harness.model.planned import PlannedLoad
from harness.model.record import Load, LoadRequest, Model
from harness.units import MIB


def compute(context: int) -> int:
    return 1024 * context + max(15 * MIB, 10 * MIB + 512 * context)


def made(context: int, more: int = 0) -> Load:
    device = DeviceFacts(
        kind="host",
        weights_bytes=90 * MIB,
        kv_cache_bytes=context * 4096,
        compute_bytes=compute(context) + more,
        output_bytes=7,
    )
    facts = LoadFacts(engine="llama-server", dialect="llama.cpp", num_batch=512, devices={"CPU": device})
    return Load(request=LoadRequest(context=context, num_batch=512), outcome="ok", facts=facts)


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> planning.Planner:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(planning.Planner, "_run", lambda _, request: plan(request.context))
    found = planner_of(Source(model=Model(name="x"), path=tmp_path / "x.gguf"), Options())
    assert found is not None
    return found


def plan(context: int) -> PlannedLoad:
    caches = (CacheFacts(cells=context, role="full", devices={"CPU": context * 4096}),)
    return PlannedLoad(caches=caches, recurrent_bytes=0, compute_bytes=compute(context))


def test_plans_reach_from_one_batch_to_the_end_of_the_range(planner: planning.Planner) -> None:
    loads = buffers_of([made(2048), made(8192)], planner, 131_072)
    contexts = [load.request.context for load in loads]
    assert (min(contexts), max(contexts)) == (512, 131_072)
    assert len(contexts) <= MOST_PLANS
    for load in loads:
        assert load.request.purpose == "buffers"
        assert load.facts is not None
        assert load.facts.devices["CPU"] == DeviceFacts(
            kind="host", compute_bytes=compute(load.request.context), output_bytes=7
        ), "as a load would have logged it"


def test_a_plan_that_differs_from_a_load_says_nothing_of_others(
    planner: planning.Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert buffers_of([made(2048), made(8192, more=MIB)], planner, 131_072) == []
    monkeypatch.setattr(planning.Planner, "_run", lambda *_: None)
    assert buffers_of([made(4096)], planner, 131_072) == []


def test_there_is_no_planner_for_what_no_plan_has(tmp_path: Path) -> None:
    source = Source(model=Model(name="x"), path=tmp_path)
    assert planner_of(source, Options()) is not None
    assert planner_of(source, Options(env={"LLAMA_ARG_SWA_FULL": "1"})) is None
    assert planner_of(msgspec.structs.replace(source, path=None), Options()) is None
