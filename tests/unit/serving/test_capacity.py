"""The largest context of every model, and which models fit together."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from harness.errors import NotFoundError, UnknownVerdictError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.prediction.memory import predict
from harness.render.capacity import notes
from harness.serving.capacity import CapacityPlan, plan
from harness.store.yaml import read_calibration
from harness.units import GIB
from tests.support.calibrations import made_up, on_host, store_of, with_version
from tests.support.command import Command
from tests.support.rules import judge, judge_together


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


def test_two_calibrations_of_one_model_are_told_apart(tmp_path: Path) -> None:
    twin = msgspec.structs.replace(made_up("one"), id="llama-server/twin")
    store = store_of(tmp_path, made_up("one"), twin)
    (memory,) = plan([], store, LocalMachine(), available=(24 * GIB,) * 2).memories
    assert {row.name for row in memory.rows} == {"llama-server/one", "llama-server/twin"}
    (group,) = memory.groups
    assert sum(sum(card.values()) for card in group.cards.values()) == group.required_bytes


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
    with pytest.raises(UnknownVerdictError):
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
    other = run("plan", "--available", "24GiB", "--flash-attention", "off")
    assert other.stdout.endswith("answers; the warnings say why\n"), "the store is not empty"
    assert "calibrated with flash attention enabled, not disabled" in other.stderr


def small(name: str) -> Calibration:
    """A twentieth of :func:`made_up`."""
    made = made_up(name)
    metadata = made.metadata
    (band,) = metadata.bands
    parts = {field: getattr(band, field) / 20 for field in ("base_vram_gb", "kv_cache_gb_per_10k", "compute_gb_per_10k")}
    constants = msgspec.structs.replace(made.constants, **parts)
    whole = ("weights", "overhead", "compute", "fixed_cache")
    twentieth = {field: (getattr(metadata.breakdown_gb, field) or 0.0) / 20 for field in whole}
    breakdown = msgspec.structs.replace(metadata.breakdown_gb, **twentieth)
    band = msgspec.structs.replace(band, **parts, fixed_cache_gb=(band.fixed_cache_gb or 0.0) / 20)
    quality = msgspec.structs.replace(metadata.quality, loads=())
    changed = msgspec.structs.replace(metadata, bands=(band,), breakdown_gb=breakdown, quality=quality)
    return msgspec.structs.replace(made, constants=constants, metadata=changed)


def test_of_more_than_twelve_models_none_is_left_out(tmp_path: Path) -> None:
    store = store_of(tmp_path, *(small(f"m{number}") for number in range(14)))
    (memory,) = plan((), store, LocalMachine(), available=(24 * GIB,)).memories
    (group,) = memory.groups
    assert len(group.models) == 14
    assert memory.all_sets


def test_where_not_every_set_can_be_tried_it_is_said(tmp_path: Path) -> None:
    store = store_of(tmp_path, *(made_up(f"m{number}") for number in range(16)))
    (memory,) = plan((), store, LocalMachine(), available=(24 * GIB,)).memories
    assert {len(group.models) for group in memory.groups} == {5}
    assert not memory.all_sets
    assert any("more such sets" in line for line in notes(memory))


def test_sets_have_the_models_that_are_preferred(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up("big"), *(small(f"m{number}") for number in range(6)))
    free = (round(predict(made_up(), 8192).total_bytes * 1.07) + GIB,)
    plain, preferred = (plan((), store, LocalMachine(), available=free, prefer=prefer).memories[0] for prefer in ((), ("big",)))
    assert "big" not in plain.groups[0].models
    assert "big" in preferred.groups[0].models
    with pytest.raises(NotFoundError):
        plan((), store, LocalMachine(), available=free, prefer=("nothing",))


def test_a_set_over_two_cards_says_who_is_where_and_how_far_contexts_go(run: Command, tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", made_up("one"), made_up("two"))
    (memory,) = plan((), store, LocalMachine(), available=(9 * GIB, 7 * GIB)).memories
    (group,) = memory.groups
    assert sum(size for card in group.cards.values() for size in card.values()) == group.required_bytes
    assert all(
        sum(held.values()) <= card.available_bytes for card, held in zip(memory.cards, group.cards.values(), strict=True)
    )
    requests = [(made_up(name), group.largest_context, 1) for name in ("one", "two")]
    assert judge_together(requests, (9 * GIB, 7 * GIB))[1] == ["resident", "resident"]
    requests = [(made_up(name), group.largest_context + 512, 1) for name in ("one", "two")]
    assert judge_together(requests, (9 * GIB, 7 * GIB))[1] != ["resident", "resident"]
    text = run("plan", "--available", "9GiB,7GiB").stdout
    assert "2 cards · 9.0 GiB + 7.0 GiB free" in text.replace("9,216.0 MiB", "9.0 GiB").replace("7,168.0 MiB", "7.0 GiB")
    assert "16.0 GiB" not in text, "no sum of cards"
    assert [line.split()[0] for line in text.splitlines() if "█" in line and " free" in line] == ["GPU0", "GPU1"]


def test_a_set_that_ollama_would_not_keep_is_none_and_its_limit_is_named(tmp_path: Path) -> None:
    models = [
        msgspec.structs.replace(with_version(small(f"m{number}"), "0.33.0"), id=f"ollama/m{number}", engine="ollama")
        for number in range(5)
    ]
    store = store_of(tmp_path, *models)
    (memory,) = plan((), store, LocalMachine(), available=(80 * GIB,)).memories
    assert {len(group.models) for group in memory.groups} == {3}
    assert [(one.engine, one.step, one.figures) for one in memory.limits] == [("Ollama", "evict-limit", {"limit": 3})]
    assert any("at most 3 models loaded (OLLAMA_MAX_LOADED_MODELS)" in line for line in notes(memory))


def test_a_calibration_of_which_the_parts_are_unknown_hides_no_other_at_more_slots(tmp_path: Path) -> None:
    strange = made_up("strange")
    breakdown = msgspec.structs.replace(
        strange.metadata.breakdown_gb, weights=None, fixed_cache=None, compute=None, overhead=None
    )
    strange = msgspec.structs.replace(strange, metadata=msgspec.structs.replace(strange.metadata, breakdown_gb=breakdown))
    store = store_of(tmp_path, made_up("one"), strange)
    found = plan((), store, LocalMachine(), available=(24 * GIB,), num_parallel=2)
    assert [row.name for memory in found.memories for row in memory.rows] == ["one"]
    assert any("strange" in text and "slots" in text for text in found.warnings)
    with pytest.raises(UnknownVerdictError):
        plan(("strange",), store, LocalMachine(), available=(24 * GIB,), num_parallel=2)


def test_every_model_of_a_large_set_has_a_mark_on_its_card(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", *(small(f"m{number}") for number in range(12)))
    done = run("plan", "--available", "24GiB")
    assert done.returncode == 0
    (bar,) = [line for line in done.stdout.splitlines() if line.startswith("GPU0")]
    assert set("█▓▒▞▚░") <= set(bar)


def test_two_cards_are_not_the_hosts_memory_whatever_the_engine(tmp_path: Path) -> None:
    """The sum of two cards was shown as host memory, and vLLM on the host was judged by it."""
    golden = Path(__file__).parents[2] / "golden" / "vllm" / "0.32.0-cpu" / "tiny-llama.yaml"
    store = store_of(tmp_path, on_host(made_up("one")))
    store.write(store.path_of("vllm", "tiny-llama"), read_calibration(golden))
    (memory,) = plan([], store, LocalMachine(), available=(24 * GIB,) * 2).memories
    assert (memory.name, memory.available_bytes, memory.groups) == ("host memory", None, ())
    assert {row.verdict.verdict for row in memory.rows} == {"unknown"}
    (single,) = plan(["vllm/tiny-llama"], store, LocalMachine(), available=(24 * GIB,)).memories
    assert single.rows[0].verdict.verdict == "fits"


def test_host_memory_that_does_not_suffice_has_no_layers_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store_of(tmp_path / "store", on_host(made_up()))
    done = Command(tmp_path, monkeypatch, capfd)("predict", "made-up@8192", "--available", "50MiB")
    assert "with 50.0 MiB free: it does not fit" in done.stdout
    assert "GPU" not in done.stdout
