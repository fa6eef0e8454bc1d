"""A sweep's plan means what people know of matrices in CI, and says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import BadInputError
from harness.sweep.matrix import Cell, read_plan


def cells(text: str, *, here: bool = False) -> tuple[Cell, ...]:
    return read_plan(yaml.safe_load(text), "plan.yaml", here=here)


def asked(text: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(cell, name) for name in names) for cell in cells(text)]


def test_the_plans_of_the_page_are_plans() -> None:
    """The first one named two cells for one file."""
    page = (Path(__file__).parents[3] / "docs/how-to/sweep.md").read_text(encoding="utf-8")
    plans = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "matrix:" in block]
    assert plans
    for plan in plans:
        assert cells(plan)


def test_a_matrix_is_every_combination_in_its_own_order() -> None:
    found = asked("matrix: {model: [a, b], kv_cache_type: [f16, q8_0]}", "model", "kv_cache_type", "variant")

    assert found == [("a", "f16", None), ("a", "q8_0", "q8_0"), ("b", "f16", None), ("b", "q8_0", "q8_0")]


def test_an_exclude_removes_what_it_matches_in_all_its_keys() -> None:
    text = "matrix: {model: [a, b], kv_cache_type: [f16, q8_0]}\nexclude: [{model: b, kv_cache_type: q8_0}]"

    assert asked(text, "model", "kv_cache_type") == [("a", "f16"), ("a", "q8_0"), ("b", "f16")]


def test_an_include_extends_what_it_does_not_contradict_or_stands_alone() -> None:
    text = """
    matrix: {model: [a, b]}
    include:
    - {timeout: 60}
    - {model: b, timeout: 90}
    - {model: c, engine: ollama}
    """

    assert asked(text, "model", "timeout", "engine") == [("a", 60.0, "auto"), ("b", 90.0, "auto"), ("c", 600.0, "ollama")]


def test_defaults_lie_under_every_cell() -> None:
    found = asked(
        "defaults: {speed: false, ctx: '1024, 2048'}\nmatrix: {model: [a]}\ninclude: [{model: b, speed: true}]", "speed"
    )

    assert found == [(False,), (True,)]
    assert cells("defaults: {ctx: '1024, 2048'}\ninclude: [{model: b}]")[0].run_options().contexts == (1024, 2048)


def test_a_machine_names_its_variant_on_a_cluster_and_nothing_here() -> None:
    text = "matrix: {model: [a], kv_cache_type: [f16, q8_0], machine: [rtx3090, a100]}"

    assert [cell.variant for cell in cells(text)] == ["rtx3090", "a100", "q8_0-rtx3090", "q8_0-a100"]
    assert [(cell.variant, cell.machine) for cell in cells(text, here=True)] == [(None, None), ("q8_0", None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "mapping"),
        ("matrix: {}", "no cell"),
        ("matrix: {model: a}", "matrix.model: a list"),
        ("matrix: {model: []}", "matrix.model: a list"),
        ("matrix: {model: [a], kvtype: [f16]}", "unknown option 'kvtype'"),
        ("matrices: {model: [a]}", "unknown key 'matrices'"),
        ("matrix: {kv_cache_type: [f16]}", "cell 1"),
        ("matrix: {model: [a]}\nexclude: [{engine: ollama}]", "exclude names 'engine'"),
        ("matrix: {model: [a]}\ninclude: {model: b}", "include: a list"),
        ("matrix: {model: [a], num_parallel: [two]}", "cell 1"),
        ("matrix: {model: [a], num_parallel: [0]}", "at least 1"),
        ("matrix: {model: [a], ctx: [some]}", "cell 1"),
        ("matrix: {model: [a], engine: [tgi]}", "cell 1"),
        ("include: [{model: a, timeout: 60}, {model: a, timeout: 90}]", "write the same calibration"),
        ("matrix: {model: [a], on: [x]}", "names"),  # YAML reads "on" as a truth value
    ],
)
def test_a_plan_that_means_nothing_is_told_so(text: str, said: str) -> None:
    with pytest.raises(BadInputError, match=said) as caught:
        cells(text)

    assert caught.value.message.startswith("plan.yaml")


def test_a_matrix_too_large_is_refused_before_it_is_built() -> None:
    axes = {name: list(range(1, 200)) for name in ("ctx", "num_batch", "num_parallel")}

    with pytest.raises(BadInputError, match="7880599 cells"):
        read_plan({"matrix": {"model": ["a"], **axes}}, "plan.yaml")


@given(
    st.lists(st.text("abc:/é ", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["f16", "q8_0", "q4_0"]), min_size=1, unique=True),
    st.lists(st.integers(1, 4096), min_size=1, max_size=3, unique=True),
)
def test_each_cell_has_a_file_and_a_key_of_its_own(models: list[str], types: list[str], batches: list[int]) -> None:
    plan = {"matrix": {"model": models, "kv_cache_type": types, "num_batch": batches}}

    found = read_plan(plan, "plan.yaml")

    assert len(found) == len(models) * len(types) * len(batches)
    assert len({(cell.engine, cell.model, cell.variant) for cell in found}) == len(found)
    assert len({cell.key for cell in found}) == len(found)
    assert all(character.isascii() and (character.isalnum() or character in "._-") for cell in found for character in cell.key)


def test_values_that_may_be_secret_are_in_no_title_and_no_file_name() -> None:
    plan = {"matrix": {"model": ["m"], "env": [{"LLAMA_ARG_FIT": "off"}, {"GH_PAT": "s3cr3t"}]}}
    for cell in read_plan(plan, "plan"):
        assert "s3cr3t" not in f"{cell.title} {cell.variant} {cell.public()}"
    assert "LLAMA_ARG_FIT" in read_plan(plan, "plan")[0].title
