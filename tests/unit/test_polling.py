"""Waiting with a deadline."""

from __future__ import annotations

import pytest

from harness.errors import EngineError
from harness.polling import poll


def test_it_asks_until_it_holds() -> None:
    answers = iter([False, False, True, False])
    looks: list[str] = []
    assert poll(lambda: next(answers), limit=60, every=0, alive=lambda: looks.append("alive"))
    assert looks == ["alive", "alive"]


def test_it_asks_at_least_once_and_gives_up() -> None:
    assert poll(lambda: True, limit=0)
    assert not poll(lambda: False, limit=0)


def test_an_engine_that_ended_ends_the_wait() -> None:
    def alive() -> None:
        raise EngineError("the engine ended with status 1")

    with pytest.raises(EngineError, match="status 1"):
        poll(lambda: False, limit=60, alive=alive)
