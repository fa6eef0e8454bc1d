"""The report's planner answers as ``harness check`` does: its script looks the tables up here, without a browser."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from harness.engines.registry import policy_of
from harness.model.calibration import Calibration
from harness.prediction import planner, verdict
from harness.prediction.placement import Placer
from harness.prediction.planner import PlannerTable, planner_table
from harness.units import GIB
from tests.support.planner_cases import expected, zoo
from tests.support.planner_script import planner_script
from tests.support.rules import judge, judge_together

pytestmark = pytest.mark.requires("quickjs")
CASES = 1200
LOOK = "([name, cards, slots, context, free]) => planner.look(all[name], cards, slots, context, free)"


@pytest.fixture(scope="module")
def animals() -> dict[str, Calibration]:
    return zoo(random.Random(1))


@pytest.fixture(scope="module")
def tables(animals: dict[str, Calibration]) -> dict[str, PlannerTable]:
    return {name: planner_table(one, policy_of(one.engine)) for name, one in animals.items()}


@pytest.fixture(scope="module")
def script(tables: dict[str, PlannerTable]) -> Any:
    """The page's planner, and the tables by name."""
    return planner_script(all=tables)


def ask(script: Any, expression: str, asked: list[Any]) -> list[Any]:
    answers: list[Any] = json.loads(script.eval(f"JSON.stringify({json.dumps(asked)}.map({expression}))"))
    return answers


def wrong(animals: dict[str, Calibration], asked: list[Any], answers: list[Any]) -> list[Any]:
    """Where the page says otherwise than check, with both; what is unknown has no figures on the page."""
    found = []
    for (name, cards, slots, context, free), answer in zip(asked, answers, strict=True):
        truth = expected(judge(animals[name], context, slots, (free,) * cards))
        if truth["verdict"] == "unknown":
            truth = {"verdict": "unknown"}
        elif cards > 1 and truth["verdict"] == "offload":  # how it is split is not listed
            truth = {key: truth[key] for key in ("verdict", "tight", "layersTotal")}
        elif cards > 1:  # one that keeps less than its margin does so by what is free; the engine may use one card alone
            truth = {key: value for key, value in truth.items() if key not in ("reserve", "available")}
        if differs := {key: (answer.get(key), value) for key, value in truth.items() if answer.get(key) != value}:
            found.append((name, cards, slots, context, free, differs))
    return found


def test_one_model_is_judged_as_check_judges_it(
    script: Any, animals: dict[str, Calibration], tables: dict[str, PlannerTable]
) -> None:
    rng = random.Random(20261125)
    names = [name for name in animals if name != "pair"]
    asked = [
        [name, 1, rng.choice(tables[name].slots), rng.choice(tables[name].contexts), round(rng.uniform(0.5, 24) * GIB)]
        for name in rng.choices(names, k=CASES)
    ]

    answers = ask(script, LOOK, asked)

    assert wrong(animals, asked, answers) == []
    words = [answer["verdict"] for answer in answers]
    assert min(words.count(word) for word in ("fits", "offload")) >= 100


def test_each_step_is_where_check_has_it(script: Any, animals: dict[str, Calibration], tables: dict[str, PlannerTable]) -> None:
    """To the byte, on both sides: random figures miss the steps."""
    rng = random.Random(3)
    asked: list[Any] = []
    for name in animals:
        if name == "pair":
            continue
        for place in rng.sample(range(len(tables[name].contexts)), 3):
            cell = tables[name].cells[0][0][place]
            edges = sorted({*cell.steps[2::2], *cell.layouts[2::2]})
            for free in rng.sample(edges, min(len(edges), 6)):
                asked += [[name, 1, tables[name].slots[0], tables[name].contexts[place], free - below] for below in (0, 1)]

    assert wrong(animals, asked, ask(script, LOOK, asked)) == []
    assert len(asked) > 200


def test_several_cards_are_judged_one_by_one(
    script: Any, animals: dict[str, Calibration], tables: dict[str, PlannerTable]
) -> None:
    rng = random.Random(5)
    asked: list[Any] = []
    for name in ("pair", "plain", "window", "experts", "hybrid", "ollama-new"):
        own = animals[name].metadata.settings.num_parallel
        cells = tables[name].cells[-1][tables[name].slots.index(own)]
        powers = [place for place, context in enumerate(tables[name].contexts) if context & (context - 1) == 0]
        for place in rng.choices(powers, k=6):
            steps = rng.sample(cells[place].steps[2::2], 2)
            frees = [rng.randrange(2 * cells[place].steps[-2]), *(step - below for step in steps for below in (0, 1))]
            asked += [[name, 2, own, tables[name].contexts[place], free] for free in frees]

    answers = ask(script, LOOK, asked)

    assert wrong(animals, asked, answers) == []
    assert {answer["verdict"] for answer in answers} >= {"fits", "offload"}


def test_what_a_table_asks_the_rules_grows_with_its_steps_alone(
    animals: dict[str, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of 200 calibrations has half a million steps: none of them is searched for byte by byte."""
    asked = {"searches": 0, "verdicts": 0}

    def counted(name: str, function: Any) -> Any:
        def count(*args: Any, **options: Any) -> Any:
            asked[name] += 1
            return function(*args, **options)

        return count

    monkeypatch.setattr(planner, "judge", counted("verdicts", verdict.judge))
    monkeypatch.setattr(Placer, "layout", counted("searches", Placer.layout))

    table = planner_table(animals["experts"], policy_of("llama-server"))

    cells = [cell for cards in table.cells for slots in cards for cell in slots if cell.steps]
    several = [cell for slots in table.cells[1] for cell in slots if cell.steps]
    assert sum(len(cell.layouts) // 2 for cell in cells) > 4000
    assert asked["verdicts"] <= 40 * len(several)
    assert asked["searches"] < 1000, "only where the order of the search decides"


def test_the_largest_context_is_the_largest_listed_that_fits(
    script: Any, animals: dict[str, Calibration], tables: dict[str, PlannerTable]
) -> None:
    asked: list[Any] = [
        [name, 1, tables[name].slots[0], gib * GIB] for name in animals if name != "pair" for gib in (1, 4, 6, 24)
    ]

    answers = ask(script, "([name, cards, slots, free]) => planner.largest(all[name], cards, slots, free)", asked)

    for (name, _, slots, free), answer in zip(asked, answers, strict=True):
        fitting = [one for one in tables[name].contexts if judge(animals[name], one, slots, (free,)).verdict == "fits"]
        assert answer == max(fitting, default=0), (name, free)


def test_models_are_planned_together_as_check_plans_them(
    script: Any, animals: dict[str, Calibration], tables: dict[str, PlannerTable]
) -> None:
    rng = random.Random(7)
    names = [name for name, one in animals.items() if name != "pair" and one.metadata.machine.target == "gpu"]
    asked: list[Any] = [
        [
            [[name, 1, rng.choice(tables[name].contexts), animals[name].engine] for name in rng.choices(names, k=5)],
            round(rng.uniform(4, 40) * GIB),
        ]
        for _ in range(CASES // 10)
    ]

    answers = ask(
        script,
        "([requests, free]) => planner.together(requests.map(([name, ...rest]) => [all[name], ...rest]), free)"
        ".map(one => [one.verdict, one.fate])",
        asked,
    )

    for (requests, free), answer in zip(asked, answers, strict=True):
        verdicts, fates = judge_together([(animals[name], context, slots) for name, slots, context, _ in requests], (free,))
        assert answer == [[verdict.verdict, fate] for verdict, fate in zip(verdicts, fates, strict=True)], requests
    assert {fate for answer in answers for _, fate in answer} >= {"resident", "offload", "evicted"}


def test_what_is_not_listed_is_unknown(script: Any) -> None:
    asked: list[Any] = [
        ["plain", 1, 3, 8192, GIB],
        ["plain", 1, 1, 8191, GIB],
        ["plain", 3, 1, 8192, GIB],
        ["pair", 1, 1, 8192, GIB],
    ]
    assert {answer["verdict"] for answer in ask(script, LOOK, asked)} == {"unknown"}
