"""Host memory: every way to ask answers as ``check`` does, with what a server may come to take of it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.engines.registry import policy_of
from harness.errors import OffloadLikelyError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.model.gpu import LocalGpu
from harness.prediction.forced import NOTHING, Forced
from harness.prediction.host import HostMemory
from harness.prediction.planner import planner_table
from harness.prediction.tuning import Demand
from harness.render.capacity import notes
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
from harness.serving.capacity import CapacityRow, plan
from harness.serving.check import Assessment, check
from harness.serving.server import decide
from harness.serving.tuning import tune
from harness.store.store import Store
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, on_host, store_of, with_settings, with_version
from tests.support.command import Command
from tests.support.planner_cases import with_metadata
from tests.support.planner_script import planner_script

CONTEXTS = (2048, 8192, 32768, 131072)
#: Below what 8,192 tokens need, just above it, with room for some of what a server takes later, and for all of it.
FREE = (4 * GIB, 4700 * MIB, 5 * GIB, 8 * GIB, 13 * GIB, 14 * GIB, 24 * GIB)
#: Of ``check`` and ``plan``, of a choice of ``tune``.
ASKED = ("verdict", "tight", "host_growth_bytes", "host_required_bytes", "host_short_bytes", "required_bytes")


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalMachine, "engine_version", lambda *_: None)
    monkeypatch.setattr(LocalMachine, "running", lambda *_: ())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def checked(store: Store, context: int, free: int, wanted: CalibrationFilter | None = None) -> Assessment:
    asked = CheckRequest(model="made-up", context=context, num_parallel=1)
    return check([asked], store, LocalMachine(), wanted=wanted, available=(free,)).models[0]


def planned(store: Store, free: int, wanted: CalibrationFilter | None = None) -> CapacityRow:
    return plan(["made-up"], store, LocalMachine(), wanted=wanted, available=(free,)).memories[0].rows[0]


def answer(found: Any) -> dict[str, object]:
    document = found if isinstance(found, dict) else found.to_json()
    return {field: document[field] for field in ASKED}


def agrees(store: Store, free: int, wanted: CalibrationFilter | None = None) -> list[dict[str, object]]:
    """What check says of each context, after plan, tune and the guard of serve were seen to say the same."""
    asked = {context: checked(store, context, free, wanted) for context in CONTEXTS}
    row = planned(store, free, wanted)
    largest = row.largest_context or 0
    for context, judged in asked.items():
        assert (judged.verdict == "fits") is (context <= largest), (free, context, largest)
        assert judged.details is not None
        assert judged.details.max_context == largest
        if judged.verdict == "fits":
            assert decide(judged, "refuse") == context
        else:
            with pytest.raises(OffloadLikelyError):
                decide(judged, "refuse")
        if largest:
            shrunk = decide(judged, "shrink")
            assert checked(store, shrunk, free, wanted).verdict == "fits", (free, context, shrunk)
    if largest:
        assert answer(row) == answer(checked(store, largest, free, wanted))
    if wanted is not None and wanted.forced != NOTHING:  # tune places no layers
        return [answer(one) for one in asked.values()]
    tuned = tune("made-up", store, LocalMachine(), Demand(), wanted=wanted, available=(free,)).tuning
    for choice in tuned.choices:
        if not choice.changes:
            assert answer(msgspec.to_builtins(choice)) == answer(checked(store, choice.context, free, wanted))
    assert (tuned.best is not None and not tuned.best.changes) is (largest > 0)
    return [answer(one) for one in asked.values()]


@pytest.mark.parametrize(("cache", "most"), [(None, 8192), ("100", 100), ("0", 0), ("-1", 224 + 15)])
def test_in_host_memory_all_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str | None, most: int) -> None:
    """Without a limit a server keeps prompts of one context; 32 checkpoints of the 15 MiB that are fixed come beside it."""
    store = store_of(tmp_path, on_host(made_up()))
    if cache is not None:
        monkeypatch.setenv("LLAMA_ARG_CACHE_RAM", cache)
    found = [one for free in FREE for one in agrees(store, free)]

    assert {(one["verdict"], one["tight"]) for one in found} == {("fits", True), ("fits", False), ("offload", False)}
    at_8192 = answer(checked(store, 8192, 24 * GIB))
    assert at_8192["host_growth_bytes"] == pytest.approx((most + 32 * 15) * MIB, abs=MIB)


def test_a_model_is_tight_to_the_byte(tmp_path: Path) -> None:
    store = store_of(
        tmp_path, with_metadata(on_host(made_up()), quality=msgspec.structs.replace(made_up().metadata.quality, max_error=0.01))
    )
    details = checked(store, 8192, 24 * GIB).details
    assert details is not None
    assert details.uncertainty_bytes
    edge = (details.required_bytes or 0) + details.uncertainty_bytes + (details.host_growth_bytes or 0)
    assert [answer(checked(store, 8192, free))["tight"] for free in (edge - 1, edge)] == [True, False]


@pytest.mark.parametrize("asked", [NOTHING, Forced(gpu_layers=20)])
def test_beside_a_card_all_say_the_same(tmp_path: Path, asked: Forced) -> None:
    """A part of 200 MiB is on the host whatever is on the card; layers that spill need more."""
    one = made_up()
    placement = msgspec.structs.replace(one.metadata.placement, host_gb=200 / 1024)
    store = store_of(tmp_path, with_metadata(one, placement=placement))
    found = [
        one
        for host in (100 * MIB, 4 * GIB, 16 * GIB)
        for free in (4 * GIB, 6 * GIB, 24 * GIB)
        for one in agrees(store, free, CalibrationFilter(host_available=host, forced=asked))
    ]

    assert {(one["verdict"], one["tight"]) for one in found} == {("fits", True), ("fits", False), ("offload", False)}


@pytest.mark.requires("quickjs")
@pytest.mark.parametrize("cache", [None, "100"])
def test_the_page_says_the_same_with_the_variables_that_were_recorded(tmp_path: Path, cache: str | None) -> None:
    env = {} if cache is None else {"LLAMA_ARG_CTX_CHECKPOINTS": "4", "LLAMA_ARG_CACHE_RAM": cache}
    calibration = with_settings(on_host(made_up()), env=env)
    store = store_of(tmp_path, calibration)
    table = planner_table(calibration, policy_of("llama-server"))
    script = planner_script(table=table)
    seen = set()
    for free in FREE:
        for context in (one for one in CONTEXTS if one in table.contexts):
            page = json.loads(script.eval(f"JSON.stringify(planner.look(table, 1, 1, {context}, {free}))"))
            details = checked(store, context, free).details
            assert details is not None
            assert (page["verdict"], page["tight"], page["growth"]) == (
                details.verdict, details.tight, details.host_growth_bytes
            )  # fmt: skip
            seen.add((page["verdict"], page["tight"]))
    assert seen == {("fits", True), ("fits", False), ("offload", False)}
    assert "LLAMA_ARG_CACHE_RAM" in (table.uncounted or "")


def beside_each_other(count: int) -> list[Calibration]:
    return [on_host(made_up(f"model-{index}")) for index in range(count)]


@pytest.mark.requires("quickjs")
def test_what_servers_that_were_started_before_may_take_counts_for_the_next(tmp_path: Path) -> None:
    """Each of two alone leaves room for the caches of one server; both take those of two."""
    calibrations = beside_each_other(2)
    store, table = store_of(tmp_path, *calibrations), planner_table(calibrations[0], policy_of("llama-server"))
    asked = [CheckRequest(model=one.metadata.model.name, context=8192, num_parallel=1) for one in calibrations]
    script = planner_script(one=[table, 1, 8192, "llama-server"])
    seen = []
    for gib in (8, 16, 22, 24, 26, 28):
        answers = check(asked, store, LocalMachine(), available=(gib * GIB,)).models
        page = json.loads(script.eval(f"JSON.stringify(planner.together([one, one], {gib * GIB}))"))
        said = [(one.verdict, one.details.tight) for one in answers if one.details is not None]
        assert said == [(one["verdict"], one["tight"]) for one in page]
        groups = plan([], store, LocalMachine(), available=(gib * GIB,)).memories[0].groups
        assert [group.tight for group in groups] == ([any(tight for _, tight in said)] if said[1][0] == "fits" else [])
        seen.append([tight for _, tight in said])
    assert seen == [[True, False], [False, True], [False, True], [False, True], [False, True], [False, False]]


def test_models_whose_parts_the_host_cannot_hold_together_are_no_set(tmp_path: Path) -> None:
    parts = []
    for name in ("one", "two"):
        made = made_up(name)
        placement = msgspec.structs.replace(made.metadata.placement, host_gb=1.0)
        parts.append(with_metadata(made, placement=placement))
    store = store_of(tmp_path, *parts)
    for host, sets in ((1536 * MIB, 0), (2 * GIB, 1)):
        wanted = CalibrationFilter(host_available=host)
        (memory,) = plan([], store, LocalMachine(), wanted=wanted, available=(24 * GIB,)).memories
        assert len(memory.groups) == sets
        assert ("no set of llama-server whose parts host memory cannot hold" in notes(memory)) is (sets == 0)
        asked = [CheckRequest(model=name, context=8192, num_parallel=1) for name in ("one", "two")]
        assert check(asked, store, LocalMachine(), wanted=wanted, available=(24 * GIB,)).fits is (sets == 1)


def test_a_model_in_host_memory_and_one_on_a_card_share_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has room alone, and both have none, whichever is started first."""
    card = LocalGpu(key="0", name="NVIDIA Test A", uuid="GPU-0", total_bytes=24 * GIB, free_bytes=24 * GIB)
    monkeypatch.setattr("harness.meters.nvml.gpus", lambda: (card,))
    one = made_up("on-card")
    placement = msgspec.structs.replace(one.metadata.placement, host_gb=4.0)
    store = store_of(tmp_path, with_metadata(one, placement=placement), on_host(made_up("on-host")))
    asked = [CheckRequest(model=name, context=8192, num_parallel=1) for name in ("on-card", "on-host")]

    def at(gib: int) -> None:
        monkeypatch.setattr("harness.meters.host.available_memory", lambda: gib * GIB)

    for gib, together in ((6, "offload"), (10, "fits")):
        at(gib)
        for some, verdict in (*(([each], "fits") for each in asked), (asked, together), (asked[::-1], together)):
            assert check(some, store, LocalMachine()).verdict == verdict, (gib, [each.model for each in some])
    at(6)
    for gib, fits in ((6, False), (10, True)):
        wanted = CalibrationFilter(host_available=gib * GIB)
        assert check(asked, store, LocalMachine(), wanted=wanted).fits is fits, "what is typed is shared, too"
    at(20)
    alone, both = (check(some, store, LocalMachine()).models[-1].details for some in (asked[1:], asked))
    assert alone is not None
    assert both is not None
    assert (alone.tight, both.tight) == (False, True), "two servers, and two caches"


def test_what_each_model_may_take_later_adds_up_and_what_it_holds_is_gone(tmp_path: Path) -> None:
    verdict = checked(store_of(tmp_path, made_up()), 8192, 24 * GIB).details
    assert verdict is not None
    held, growth = verdict.host_required_bytes or 0, verdict.host_growth_bytes or 0
    assert min(held, growth) > 0
    twice = HostMemory(available=GIB).beside([verdict]).beside([verdict, msgspec.structs.replace(verdict, verdict="unknown")])
    assert (twice.available, twice.growth) == (GIB - 2 * held, 2 * growth)
    assert HostMemory(available=held // 2).beside([verdict]).available == 0


def test_a_prompt_cache_that_was_measured_with_is_needed_for_certain(tmp_path: Path) -> None:
    plain, sized = made_up(), with_settings(made_up(), env={"LLAMA_ARG_CACHE_RAM": "100"})
    verdicts = [checked(store_of(tmp_path / str(place), one), 8192, 24 * GIB).details
                for place, one in enumerate((plain, sized))]  # fmt: skip
    without, with_cache = (one for one in verdicts if one is not None)
    assert (with_cache.host_required_bytes or 0) - (without.host_required_bytes or 0) == 100 * MIB
    assert (without.host_growth_bytes or 0) - (with_cache.host_growth_bytes or 0) == 8192 * MIB


def test_a_model_that_the_engine_ends_takes_nothing_of_the_host_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of Ollama that do not stay together, and one in host memory that has room for the caches of two servers."""
    monkeypatch.setenv("LLAMA_ARG_CACHE_RAM", "1000")

    def ollama(name: str) -> Calibration:
        return msgspec.structs.replace(with_version(made_up(name), "0.33.0"), engine="ollama", id=f"ollama/{name}")

    store = store_of(tmp_path, ollama("one"), ollama("two"), on_host(ollama("three")))
    alone = check([CheckRequest(model="three", context=8192, num_parallel=1)], store, LocalMachine(), available=(64 * GIB,))
    details = alone.models[0].details
    assert details is not None
    growth = details.host_growth_bytes or 0
    needs = (details.required_bytes or 0) + (details.uncertainty_bytes or 0)
    asked = [CheckRequest(model=name, context=8192, num_parallel=1) for name in ("one", "two", "three")]
    for more, tight in ((growth * 5 // 2, False), (growth * 3 // 2, True)):
        answers = check(asked, store, LocalMachine(), available=(needs + more,)).models
        assert sorted(str(one.fate) for one in answers) == ["evicted", "resident", "resident"]
        assert (answers[2].details is not None and answers[2].details.tight) is tight


def test_predict_with_so_much_memory_says_the_same(tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_CACHE_RAM", "4096")
    one = made_up("on-card")
    placement = msgspec.structs.replace(one.metadata.placement, host_gb=1.0)
    store_of(tmp_path / "store", with_metadata(one, placement=placement), on_host(made_up("on-host")))
    seen = set()
    for model in ("on-card", "on-host"):
        for free in ("4GiB", "8GiB", "24GiB"):
            for host in ((), ("--host-available", "512MiB"), ("--host-available", "5GiB"), ("--host-available", "16GiB")):
                asked = (f"{model}@8192", "--available", free, *host, "--json")
                checked, predicted = (json.loads(run(verb, *asked).stdout)["data"] for verb in ("check", "predict"))
                said = {field: checked[field] for field in ASKED}
                assert said == {field: predicted["with_available"][field] for field in ASKED}, asked
                seen.add((said["verdict"], said["tight"]))
    assert seen == {("fits", True), ("fits", False), ("offload", False)}
    text = " ".join(run("predict", "on-host@8192", "--available", "8GiB").stdout.split())
    assert "everything fits, tight: its server may take up to 4,576.0 MiB more of host memory later" in text


def test_what_is_uncertain_in_host_memory_is_not_there_for_caches(tmp_path: Path) -> None:
    one = on_host(made_up())
    store = store_of(tmp_path, with_metadata(one, quality=msgspec.structs.replace(one.metadata.quality, max_error=0.005)))
    found = checked(store, 8192, 64 * GIB).details
    assert found is not None
    growth, uncertain = found.host_growth_bytes or 0, found.uncertainty_bytes or 0
    assert uncertain > 16 * MIB
    edge = (found.required_bytes or 0) + uncertain + growth
    answers = [checked(store, 8192, edge + more).details for more in (0, -1)]
    assert [one.tight for one in answers if one is not None] == [False, True]


def test_what_was_not_logged_of_the_host_is_unknown_and_layers_that_spill_are_counted(tmp_path: Path) -> None:
    one = made_up()
    store = store_of(tmp_path, with_metadata(one, placement=msgspec.structs.replace(one.metadata.placement, host_gb=None)))
    whole, spilled = checked(store, 8192, 24 * GIB).details, checked(store, 8192, 4 * GIB).details
    assert whole is not None
    assert spilled is not None
    assert (whole.verdict, whole.host_required_bytes) == ("fits", None)
    assert (spilled.verdict, (spilled.host_required_bytes or 0) > GIB) == ("offload", True)


def test_tune_and_export_ask_the_host_that_is_typed(tmp_path: Path, run: Command) -> None:
    one = made_up()
    placement = msgspec.structs.replace(one.metadata.placement, host_gb=1.0)
    store_of(tmp_path / "store", with_metadata(one, placement=placement))
    for verb in (("tune", "made-up"), ("export", "llama-server", "made-up")):
        codes = [run(*verb, "--available", "24GiB", "--host-available", size).returncode for size in ("512MiB", "2GiB")]
        assert codes == [3, 0], verb


def test_several_devices_are_not_host_memory_beside_a_figure_for_the_host(tmp_path: Path) -> None:
    asked = CheckRequest(model="made-up", context=8192, num_parallel=1)
    store, sizes = store_of(tmp_path, on_host(made_up())), (24 * GIB, 12 * GIB)
    for wanted in (CalibrationFilter(), CalibrationFilter(host_available=64 * GIB)):
        found = check([asked], store, LocalMachine(), wanted=wanted, available=sizes)
        assert found.verdict == "unknown"


def test_tune_judges_host_memory_by_the_figure_for_the_host(tmp_path: Path) -> None:
    store, wanted = store_of(tmp_path, on_host(made_up())), CalibrationFilter(host_available=4 * GIB)
    assert checked(store, 8192, 24 * GIB, wanted).verdict == "offload"
    found = tune("made-up", store, LocalMachine(), Demand(context=8192), wanted=wanted, available=(24 * GIB,))
    assert not [one for one in found.tuning.choices if one.verdict == "fits"]
