"""The facts of a log do not change under any wrapping."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from harness.logs import parse_log
from tests.support.wrappings import FOLDING, WRAPPINGS

#: At one width a rest of its lines begins as its messages do.
_UNLUCKY = {("a folded log, quoted", "vllm/0.32.0-cpu/one-block-less.log")}
GOLDEN = Path(__file__).parents[2] / "golden"
#: What a wrapping may add (whose log it is) or is asked to say (what was around it, which lines stay unread).
_OF_WRAPPINGS = ("engine", "dialect", "unread", "wrapping")


def facts(data: bytes) -> list[dict[str, object]]:
    return [{name: value for name, value in load.to_json().items() if name not in _OF_WRAPPINGS} for load in parse_log(data)]


@cache
def logs() -> dict[str, tuple[list[str], list[dict[str, object]]]]:
    """Every golden log: the lines of its first 60 000 bytes, and what they say."""
    found = {}
    for path in sorted(GOLDEN.rglob("*.log")):
        lines = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n").splitlines()
        while sum(map(len, lines)) > 60_000:
            del lines[len(lines) * 9 // 10 :]
        found[str(path.relative_to(GOLDEN))] = lines, facts("\n".join(lines).encode() + b"\n")
    return found


def foldable(lines: list[str], width: int) -> bool:
    """Whether a terminal's width shows in what it breaks: three lines at least, and no records or colours."""
    return sum(len(line) > width for line in lines) >= 3 and not any("\x1b" in line or '{"' in line for line in lines)


@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_facts_of_a_log_do_not_change_under_any_wrapping(name: str) -> None:
    changed = [log for log, (lines, plain) in logs().items() if facts(WRAPPINGS[name](lines)) != plain]
    assert not changed


@pytest.mark.parametrize(("name", "width"), [(name, width) for name, (width, _) in FOLDING.items()])
def test_lines_that_a_terminal_broke_are_put_together(name: str, width: int) -> None:
    wrap = FOLDING[name][1]
    tried = {log: one for log, one in logs().items() if foldable(one[0], width) and (name, log) not in _UNLUCKY}
    assert len(tried) > 20
    assert not [log for log, (lines, plain) in tried.items() if facts(wrap(lines)) != plain]


def test_there_are_wrappings_enough() -> None:
    assert len(WRAPPINGS) + len(FOLDING) >= 60
    assert all(facts(wrap(["nothing"])) == [] for wrap in WRAPPINGS.values())
