"""pytest: ``@pytest.mark.needs_model("qwen2.5", ctx=32768)`` asks before the test starts whether the model fits now.

A model that would be offloaded to the CPU skips the test, fails it, or is a warning, by ``--model-offload`` or the ini value
``model_offload``; a model that is not calibrated likewise by ``--model-unknown`` and ``model_unknown``. Each question is
asked once a session: later, the model itself may take the memory.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.serving.check import Assessment

_WAYS = ("skip", "fail", "warn")
_ANSWERS = pytest.StashKey[dict[tuple[Any, ...], "list[Assessment]"]]()


class ModelOffloadWarning(UserWarning):
    """A test runs although its model may be slow: it would be offloaded to the CPU, or that is unknown."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and ini values."""
    group = parser.getgroup("harness", "local models")
    for word, default, what in (
        ("offload", "skip", "whose model would be offloaded to the CPU"),
        ("unknown", "warn", "whose model has no calibration"),
    ):
        group.addoption(f"--model-{word}", choices=_WAYS, help=f"what becomes of a test {what}")
        parser.addini(f"model_{word}", f"what becomes of a test {what}: skip, fail or warn", default=default)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "needs_model(name, ctx=, num_parallel=1, ...): skip, fail or warn before the test starts where the model would be "
        "offloaded to the CPU (the arguments are those of harness.check)",
    )
    config.stash[_ANSWERS] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ask for all models of a test together, before any fixture is set up."""
    markers = list(item.iter_markers("needs_model"))
    if not markers:
        return
    from harness.render.verdict import sentence, title

    for judged in _ask(item, markers):
        if judged.verdict == "fits":
            continue
        text = f"{title(judged)}: {sentence(judged)}"
        word = "offload" if judged.verdict == "offload" else "unknown"
        way = item.config.getoption(f"--model-{word}") or item.config.getini(f"model_{word}")
        if way not in _WAYS:
            raise pytest.UsageError(f"model_{word} is {way!r}; it can be {', '.join(_WAYS)}")
        if way == "skip":
            raise pytest.skip.Exception(text, _use_item_location=True)  # where the test stands, not where this line does
        if way == "fail":
            pytest.fail(text, pytrace=False)
        warnings.warn(ModelOffloadWarning(text), stacklevel=1)


def _served(name: str, ctx: int | None) -> bool:
    """Whether ``harness serve`` runs these tests in front of this very model, with room enough: it has been judged then."""
    context = os.environ.get("HARNESS_CONTEXT", "")
    return os.environ.get("HARNESS_MODEL") == name and context.isdigit() and (ctx is None or ctx <= int(context))


def _ask(item: pytest.Item, markers: list[pytest.Mark]) -> list[Assessment]:
    """What is said of the models of a test."""
    import harness

    answers = item.config.stash[_ANSWERS]
    asked: dict[str, dict[str, Any]] = {}
    for marker in reversed(markers):  # the one nearest to the test comes last, and wins
        asked |= {name: dict(marker.kwargs) for name in marker.args}
    if not asked or not all(marker.args for marker in markers):
        raise pytest.UsageError(f"{item.nodeid}: needs_model names no model")
    contexts = {name: given.pop("ctx", None) for name, given in asked.items()}
    options = next(iter(asked.values()))
    if any(given != options for given in asked.values()):
        raise pytest.UsageError(
            f"{item.nodeid}: its models are asked about together, so all but ctx has to be the same for each"
        )
    specs = [name if ctx is None else f"{name}@{ctx}" for name, ctx in contexts.items() if options or not _served(name, ctx)]
    if not specs:
        return []
    try:
        options = harness.surroundings(**options)
        key = (*specs, *sorted((name, str(value)) for name, value in options.items()))
        if key not in answers:
            answers[key] = list(harness.check(*specs, **options).models)
    except harness.HarnessError as error:
        pytest.fail(f"needs_model: {error.message}" + (f" ({error.hint})" if error.hint else ""), pytrace=False)
    return answers[key]
