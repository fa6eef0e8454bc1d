"""The report's planner answers as ``harness check`` does: its script runs here, without a browser."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from typing import Any

import pytest

from harness.model.calibration import to_document
from harness.report.page import planner_figures
from harness.units import GIB, MIB
from tests.support.planner_cases import expected, zoo
from tests.support.rules import judge, judge_together, ollama_estimate

pytestmark = pytest.mark.requires("quickjs")
CASES = 600
#: The engine inside is of 2021; browsers have had these since 2022.
NEWER = (
    "for (const kind of [Array, String]) kind.prototype.at ??= function (at) { return this[at < 0 ? this.length + at : at]; };"
)


@pytest.fixture(scope="module")
def script() -> Any:
    """The page's rules with the constants that the page is given, and the calibrations by name."""
    import quickjs

    context = quickjs.Context()
    context.eval(NEWER)
    context.eval((files("harness.report") / "assets" / "verdict.js").read_text(encoding="utf-8"))
    calibrations = {name: to_document(one) for name, one in zoo(random.Random(1)).items()}
    context.eval(f"const verdicts = verdictsBy({json.dumps(planner_figures())}), all = {json.dumps(calibrations)};")
    return context


def ask(script: Any, expression: str, asked: list[Any]) -> list[Any]:
    answers: list[Any] = json.loads(script.eval(f"JSON.stringify({json.dumps(asked)}.map({expression}))"))
    return answers


def test_one_model_is_judged_as_check_judges_it(script: Any) -> None:
    rng = random.Random(20261125)
    animals = {name: one for name, one in zoo(random.Random(1)).items() if name != "pair"}
    asked: list[Any] = []
    for _ in range(CASES):
        name = rng.choice(list(animals))
        context, slots = rng.choice([rng.randrange(1, 180_000), 256 * rng.randrange(1, 520)]), rng.choice([1, 1, 1, 2, 4])
        asked.append([name, context, slots, [round(rng.uniform(0.5, 14) * GIB)]])

    answers = ask(script, "([name, context, slots, free]) => verdicts.judge(all[name], context, slots, free)", asked)

    wrong = []
    for (name, context, slots, available), answer in zip(asked, answers, strict=True):
        truth = expected(judge(animals[name], context, slots, tuple(available)))
        if differs := {key: (answer[key], value) for key, value in truth.items() if answer[key] != value}:
            wrong.append((name, context, slots, available, differs))
    assert wrong == []
    words = [answer["verdict"] for answer in answers]
    assert min(words.count(word) for word in ("fits", "offload", "unknown")) >= 30


def test_several_devices_are_not_judged_by_their_sum(script: Any) -> None:
    asked: list[Any] = [["pair", 8192, 1, [24 * GIB, 24 * GIB]], ["window", 8192, 1, [24 * GIB, 24 * GIB]]]
    answers = ask(script, "([name, context, slots, free]) => verdicts.judge(all[name], context, slots, free)", asked)
    assert [(one["verdict"], one["maxContext"]) for one in answers] == [("unknown", None)] * 2


def test_models_are_planned_together_as_check_plans_them(script: Any) -> None:
    rng = random.Random(7)
    animals = {name: one for name, one in zoo(random.Random(1)).items() if name != "pair"}
    asked: list[Any] = [
        [[[rng.choice(list(animals)), 256 * rng.randrange(1, 540), 1] for _ in range(5)], [round(rng.uniform(4, 40) * GIB)]]
        for _ in range(CASES // 10)
    ]

    answers = ask(
        script,
        "([requests, free]) => verdicts.judgeTogether(requests.map(([name, ...rest]) => [all[name], ...rest]), free)"
        ".map(one => [one.verdict, one.fate])",
        asked,
    )

    for (requests, available), answer in zip(asked, answers, strict=True):
        verdicts, fates = judge_together(
            [(animals[name], context, slots) for name, context, slots in requests], tuple(available)
        )
        assert answer == [[verdict.verdict, fate] for verdict, fate in zip(verdicts, fates, strict=True)], requests
    assert {fate for answer in answers for _, fate in answer} == {"resident", "offload", "evicted", None}


@pytest.mark.parametrize("below", [False, True])
def test_each_edge_is_the_same(script: Any, below: bool) -> None:
    """Free memory to the byte where a batch of Ollama's begins to hold, and the end of a band: random figures miss it."""
    animals = zoo(random.Random(1))
    asked: list[Any] = [["window", 4608 + below, 1, [24 * GIB]]]
    for context in (4096, 4097, 32768, 32769, 40_960, 131_072):
        for extra, percent in ((0, 60), (0, 75), (0, 80), (2 * GIB, 80), (768 * MIB, 80)):
            enough = -(-(ollama_estimate(animals["ollama-new"], context) + extra) * 100 // percent)
            asked.append(["ollama-new", context, 1, [enough - below]])

    answers = ask(script, "([name, context, slots, free]) => verdicts.judge(all[name], context, slots, free)", asked)

    for (name, context, slots, available), answer in zip(asked, answers, strict=True):
        truth = expected(judge(animals[name], context, slots, tuple(available)))
        assert {key: answer[key] for key in truth} == truth
