"""``calibrate --quick``: the plan moves what was measured, and is refused where it is of another engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engines.base import Options, Source
from harness.errors import NotFoundError, UnavailableError, UntrustedError, UsageError
from harness.headers import planning
from harness.measure.prepare import prepare
from harness.measure.quick import check_quick, first_load, planned_loads
from harness.model.facts import CacheFacts, DeviceFacts, LoadFacts
from harness.model.planned import PlannedLoad
from harness.model.record import Load, LoadRequest, Model
from harness.options import RunOptions
from harness.store.store import Store
from harness.units import MIB


def plan_of(context: int, more: int = 0) -> PlannedLoad:
    return PlannedLoad(
        caches=(CacheFacts(cells=context, role="full", devices={"CPU": context * 1000}),), recurrent_bytes=0,
        compute_bytes=20 * MIB + 1000 * context + more,
    )  # fmt: skip


def made(context: int) -> Load:
    """A load on a GPU, whose compute buffers are a little smaller than those that are planned for a host."""
    device = DeviceFacts(
        kind="gpu", weights_bytes=900 * MIB, kv_cache_bytes=context * 1000, compute_bytes=19 * MIB + 1000 * context
    )
    facts = LoadFacts(
        engine="llama-server", dialect="llama.cpp", complete=True, parallel=1, num_batch=512, context_cells=context,
        devices={"CPU": DeviceFacts(kind="host", weights_bytes=10 * MIB), "CUDA0": device},
    )  # fmt: skip
    return Load(request=LoadRequest(context=context, num_batch=512), outcome="ok", facts=facts)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    return Source(model=Model(name="x"), plan_path=tmp_path / "x.gguf")


def planning_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: int = 0) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning.Planner, "_run", lambda _, request: plan_of(request.context, more))


def test_a_planned_load_is_the_one_that_was_made_and_what_the_plan_adds(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planning_with(monkeypatch, tmp_path)
    loads, error = planned_loads(made(4096), [LoadRequest(context=8192, num_batch=512)], source, Options(), "gpu")
    (load,) = loads
    assert load.request.purpose == "planned"
    assert load.facts is not None
    device = load.facts.devices["CUDA0"]
    assert device.kv_cache_bytes == 8192 * 1000
    assert device.compute_bytes == 19 * MIB + 8192 * 1000, "the device's own figure, grown as planned"
    assert load.facts.devices["CPU"].weights_bytes == 10 * MIB
    assert error == pytest.approx(1 / 927, rel=0.02)


def test_a_plan_of_another_engine_is_refused(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planning_with(monkeypatch, tmp_path, more=100 * MIB)
    with pytest.raises(UntrustedError, match="is off by"):
        planned_loads(made(4096), [LoadRequest(context=8192, num_batch=512)], source, Options(), "gpu")
    monkeypatch.setattr(planning.Planner, "_run", lambda *_: None)
    with pytest.raises(UnavailableError, match="no engine here can plan"):
        planned_loads(made(2048), [LoadRequest(context=8192, num_batch=512)], source, Options(), "gpu")


def test_what_a_plan_cannot_speak_for_is_refused_before_a_start(source: Source) -> None:
    check_quick(Options(), source)
    for options, given in (
        (Options(), Source(model=Model(name="x"))),
        (Options(env={"LLAMA_ARG_SWA_FULL": "1"}), source),
        (Options(flash_attention="off", target="gpu"), source),
    ):
        with pytest.raises(UsageError):
            check_quick(options, given)


def test_the_load_that_is_made_is_the_smallest_of_the_last_batch() -> None:
    requests = [LoadRequest(context=context, num_batch=batch) for batch, context in ((512, 4096), (1024, 32_768), (1024, 8192))]
    assert first_load(requests) == requests[2]


@pytest.mark.parametrize("name", ["https://example.org/x.gguf", "hf://me/x/y.gguf"])
def test_an_address_is_not_downloaded_in_silence(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        prepare(RunOptions(model=name, engine="llama-server", gpus="none"), Store(tmp_path), tmp_path)
    assert "--header-only" in (caught.value.hint or "")
