"""Tools for agents: every answer has its label, a failure is an answer, and nothing is fetched that was not allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import HarnessError, UsageError
from harness.serving.agents import AgentTools
from tests.support.calibrations import store_of
from tests.unit.prediction.test_tuning import MADE_UP

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tools(tmp_path: Path) -> AgentTools:
    return AgentTools(store_of(tmp_path / "store", MADE_UP))


def test_answers_are_labelled(tools: AgentTools) -> None:
    fits = tools.check(["made-up@8192"], "24GiB")
    assert (fits["verdict"], fits["label"], fits["models"][0]["label"]) == ("fits", "measured", "measured")
    both = tools.check(["made-up@8192", "unheard-of@4096"], "24GiB")
    assert (both["verdict"], both["label"]) == ("unknown", "unknown")
    assert tools.check(["made-up@8192"], "8GiB,8GiB")["label"] in ("measured", "derived")
    assert tools.tune("made-up", min_ctx=80_000, available="7GiB")["label"] == "derived"
    assert tools.tune("made-up", available="24GiB")["label"] == "measured"
    plan = tools.plan(available="24GiB")
    assert (plan["label"], plan["memories"][0]["models"][0]["largest_context"]) == ("measured", 131_072)


def test_a_model_that_is_not_calibrated_is_never_estimated_by_check(tools: AgentTools, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    found = tools.check([f"{tmp_path}/x.gguf@4096"], "24GiB")
    assert found["label"] == "unknown"


def test_no_tool_reads_an_address(tools: AgentTools, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object, **__: object) -> None:
        pytest.fail("a name was looked up")

    monkeypatch.setattr("socket.getaddrinfo", fetched)
    for model in ("https://example.org/x.gguf", "http://127.0.0.1:1/x.gguf", "hf.co/o/r:Q4_K_M", "hf://o/r/x.gguf"):
        with pytest.raises(HarnessError):
            tools.plan([model], "24GiB")
        with pytest.raises(HarnessError):
            tools.tune(model, available="24GiB")
        assert tools.check([f"{model}@4096"], "24GiB")["label"] == "unknown"


def test_what_is_no_question_is_no_answer(tools: AgentTools) -> None:
    asks: list[Callable[[], object]] = [
        lambda: tools.check([]),
        lambda: tools.check(["made-up@8192"], "24GiB", num_parallel=0),
        lambda: tools.plan(available="24GiB", context=0),
        lambda: tools.estimate(["x.gguf"], contexts=[0]),
    ]
    for ask in asks:
        with pytest.raises(UsageError):
            ask()
