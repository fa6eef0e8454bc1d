"""A question has one answer, whoever asks it: a shell, a program, the pytest guard, an agent.

What a variable or ``harness.toml`` sets counts for each of them: a way in that passes over it says FITS of other settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import harness
from harness.cli.main import cli
from harness.errors import HarnessError, UsageError
from harness.serving.agents import AgentTools
from harness.store.store import Store
from tests.support.calibrations import on_host, store_of
from tests.unit.prediction.test_tuning import MADE_UP
from tests.unit.serving.test_cards_here import Box, card

MODEL = "made-up@4096"
STATUS = {0: "fits", 3: "offload", 4: "unknown"}
#: A setting, and what is then said of a model that fits as it was calibrated.
SETTINGS = [
    ("num_parallel", 32, "offload"),
    ("available", "4GiB", "offload"),
    ("kv_cache_type", "q5_0", "fits"),
    ("kv_cache_type", "f32", "unknown"),
    ("flash_attention", "off", "unknown"),
    ("num_batch", 2048, "unknown"),
    ("engine", "vllm", "unknown"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store_of(tmp_path / "store", MADE_UP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HARNESS_AVAILABLE", "5632MiB")
    return tmp_path


def at_a_shell() -> str:
    done = CliRunner().invoke(cli, ["check", MODEL])
    return STATUS[done.exit_code]


def in_a_program() -> str:
    return harness.check(MODEL, **harness.surroundings()).verdict


def by_an_agent() -> str:
    return str(AgentTools(Store(Path("store"))).check([MODEL])["verdict"])


def in_a_plan_of_an_agent() -> str:
    try:
        memories = AgentTools(Store(Path("store"))).plan(["made-up"], context=4096)["memories"]
    except HarnessError:
        return "unknown"
    row = memories[0]["models"][0]
    if row["verdict"] == "unknown":
        return "unknown"
    return "fits" if (row["largest_context"] or 0) >= 4096 else "offload"


WAYS: list[Callable[[], str]] = [at_a_shell, in_a_program, by_an_agent, in_a_plan_of_an_agent]


@pytest.mark.parametrize("where", ["variable", "file"])
@pytest.mark.parametrize(("name", "value", "verdict"), SETTINGS)
def test_every_way_in_answers_about_what_is_set(
    name: str, value: object, verdict: str, where: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [way() for way in WAYS] == ["fits"] * 4
    if where == "file":
        monkeypatch.delenv(f"HARNESS_{name.upper()}", raising=False)
        (here / "harness.toml").write_text(f"{name} = {value!r}\n")
    else:
        monkeypatch.setenv(f"HARNESS_{name.upper()}", str(value))
    assert {way.__name__: way() for way in WAYS} == {way.__name__: verdict for way in WAYS}


@pytest.mark.parametrize("where", ["variable", "file"])
@pytest.mark.parametrize(("gpus", "verdict"), [("0", "fits"), ("1", "offload"), ("none", "unknown"), ("all", "fits")])
def test_the_gpus_that_a_start_would_have_are_those_that_are_judged(
    gpus: str, verdict: str, where: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARNESS_AVAILABLE")
    Box(monkeypatch, card("0", 22), card("1", 4))
    if where == "file":
        (here / "harness.toml").write_text(f'gpus = "{gpus}"\n')
    else:
        monkeypatch.setenv("HARNESS_GPUS", gpus)
    assert {way.__name__: way() for way in WAYS} == {way.__name__: verdict for way in WAYS}
    asked = CliRunner().invoke(cli, ["check", MODEL, "--gpu", "1"])
    assert asked.exit_code == 3, "an option comes first"
    assert CliRunner().invoke(cli, ["check", MODEL, "--available", "24GiB"]).exit_code == 0, "of another machine"
    assert AgentTools(Store(Path("store"))).check([MODEL], "24GiB")["verdict"] == "fits"


def test_without_gpus_a_calibration_in_host_memory_answers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_AVAILABLE")
    Box(monkeypatch, card("0", 22))
    store_of(here / "store", on_host(MADE_UP))
    for gpus, verdict in (("0", "unknown"), ("none", "fits")):
        monkeypatch.setenv("HARNESS_GPUS", gpus)
        assert {way() for way in WAYS} == {verdict}


def test_what_an_agent_says_comes_before_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_NUM_PARALLEL", "32")
    tools = AgentTools(Store(Path("store")))
    assert tools.check([MODEL], num_parallel=1)["verdict"] == "fits"
    assert tools.check([MODEL], "24GiB")["verdict"] == "fits"
    assert tools.tune("made-up", min_ctx=4096, available="24GiB")["settings"]["kv_cache_type"] == "f16"


def test_an_agents_advice_is_about_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = AgentTools(Store(Path("store")))
    monkeypatch.setenv("HARNESS_KV_CACHE_TYPE", "q8_0")
    assert tools.tune("made-up", min_ctx=4096)["settings"]["kv_cache_type"] == "q8_0"
    monkeypatch.setenv("HARNESS_ENGINE", "vllm")
    with pytest.raises(HarnessError):
        tools.tune("made-up", min_ctx=4096)


@pytest.mark.parametrize("name", ["HARNESS_NUM_PARALLEL", "HARNESS_AVAILABLE", "HARNESS_KV_CACHE_TYPE", "HARNESS_ENGINE"])
def test_an_empty_variable_is_refused_by_every_way_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    tools = AgentTools(Store(Path("store")))
    asks = (in_a_program, by_an_agent, lambda: tools.plan(["made-up"]), lambda: tools.tune("made-up"))
    for ask in asks:
        with pytest.raises(UsageError, match=f"{name} is empty"):
            ask()
    assert CliRunner().invoke(cli, ["check", MODEL]).exit_code == 2
