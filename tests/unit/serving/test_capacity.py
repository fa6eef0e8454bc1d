"""The largest context of every model, and which models fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import NotFoundError
from harness.inventory.machine import LocalMachine
from harness.prediction.memory import predict
from harness.serving.capacity import CapacityPlan, plan
from harness.units import GIB
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.command import Command
from tests.support.rules import judge


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalMachine, "engine_version", lambda *_: None)


def planned(root: Path, *specs: str, gib: float | None) -> CapacityPlan:
    store = store_of(root, made_up("one"), made_up("two"), made_up("three"))
    return plan(specs, store, LocalMachine(), available=None if gib is None else (round(gib * GIB),))


def test_the_largest_context_fits_and_a_larger_one_does_not(tmp_path: Path) -> None:
    (memory,) = planned(tmp_path, "one", gib=6).memories
    (row,) = memory.rows
    largest = row.largest_context or 0
    assert 0 < largest < 131072
    assert row.verdict.verdict == "fits"
    assert judge(made_up("one"), largest + 256, 1, (6 * GIB,)).verdict == "offload"
    assert memory.groups == ()


def test_a_model_that_fits_at_no_context_shows_what_would_stay(tmp_path: Path) -> None:
    (row,) = planned(tmp_path, "one", gib=4).memories[0].rows
    assert row.largest_context == 0
    assert row.verdict.verdict == "offload"
    assert 0 < (row.verdict.layers_offloaded or 0) < 29


def test_the_largest_combinations_that_fit_are_found_and_no_larger_one(tmp_path: Path) -> None:
    each = predict(made_up(), 8192).total_bytes
    (memory,) = planned(tmp_path, gib=(2 * each) / GIB + 1.01).memories
    pairs = {frozenset(group.models) for group in memory.groups}
    assert pairs == {frozenset(pair) for pair in (("one", "two"), ("one", "three"), ("two", "three"))}
    assert {group.fates for group in memory.groups} == {("resident", "resident")}
    (memory,) = planned(tmp_path, gib=(3 * each) / GIB + 1.01).memories
    (group,) = memory.groups
    assert len(group.models) == 3
    assert group.required_bytes == 3 * each
    assert planned(tmp_path, gib=(2 * each) / GIB + 0.99).memories[0].groups == ()


def test_host_and_gpu_are_two_memories(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up("one"), on_host(made_up("two")))
    found = plan((), store, LocalMachine(), available=(24 * GIB,))
    assert [(memory.name, len(memory.rows)) for memory in found.memories] == [("a card", 1), ("host memory", 1)]


def test_a_damaged_file_does_not_hide_the_others_but_a_named_one_is_an_error(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up("one"))
    store.path_of("llama-server", "bad").write_text("{")
    found = plan((), store, LocalMachine(), available=(24 * GIB,))
    assert len(found.memories[0].rows) == 1
    assert "bad.yaml" in found.warnings[0]
    with pytest.raises(NotFoundError):
        plan(("nobody",), store, LocalMachine(), available=(24 * GIB,))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def test_the_command_prints_a_table_markdown_and_json(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up("one"), made_up("two"))
    table = run("plan", "--available", "12GiB")
    assert table.returncode == 0
    assert "a card · 12.0 GiB free" in table.stdout
    assert "together at 8,192: one + two (9,414.0 MiB)" in table.stdout
    markdown = run("plan", "--available", "12GiB", "--markdown").stdout
    assert "| one | llama-server | 131,072 |" in markdown
    (memory,) = json.loads(run("plan", "--available", "12GiB", "--json").stdout)["data"]["memories"]
    assert memory["available_bytes"] == 12 * GIB
    assert {model["largest_context"] for model in memory["models"]} == {131072}
    assert memory["together"][0]["models"] == ["one", "two"]


def test_what_cannot_be_read_is_a_dash_and_an_advice(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.errors import UnavailableError

    monkeypatch.setattr(LocalMachine, "nvidia", UnavailableError("there is no driver"))
    store_of(tmp_path / "store", made_up("one"))
    done = run("plan")
    assert done.returncode == 0
    assert "there is no driver" in done.stdout
    assert "--available" in done.stdout
    assert run("plan", "--store", str(tmp_path / "empty")).stdout.startswith("no calibrations in")
