"""What is shown while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from harness.cli.progress import Live, PlainProgress, curve, watcher
from harness.units import KIB, MIB


def act(watch: PlainProgress) -> None:
    """A small run: two loads on a line, and one that spilled."""
    with watch:
        watch.say("target host: made \x1b[31mup")
        watch.phase("load 4096 tokens", 1, 3)
        for size in range(10, 60, 10):
            watch.memory(size * MIB, size * MIB)
        watch.point(4096, 512, 100 * MIB + 4096 * 4 * KIB, None)
        watch.phase("load [8192] tokens", 2, 3)
        watch.point(8192, 512, 100 * MIB + 8192 * 4 * KIB, None)
        watch.phase("load 16384 tokens", 3, 3)
        watch.progress("timing", 1, 4)
        watch.progress("timing", 2, 4)
        watch.point(16384, 512, 90 * MIB, "only 3 of 4 layers are on the GPU")


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def on_terminal(patch: pytest.MonkeyPatch, columns: int = 80, **env: str) -> tuple[PlainProgress, Terminal]:
    """Make stderr a terminal; the watcher that is chosen for it, and what is drawn there."""
    stream = Terminal()
    patch.setattr(sys, "stderr", stream)
    patch.delenv("NO_COLOR", raising=False)
    for name, value in {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color", **env}.items():
        patch.setenv(name, value)
    return watcher(quiet=False), stream


def test_a_terminal_keeps_each_load_with_the_line_so_far_and_drops_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, terminal = on_terminal(monkeypatch)
    assert isinstance(watch, Live)
    act(watch)
    drawn = terminal.getvalue()
    assert "= 100.0 MiB + 4.000 KiB/token" in drawn
    assert "\x1b[31mup" not in drawn
    assert drawn.rstrip().endswith("\x1b[2K")  # the live line is wiped at the end


def test_the_live_line_has_phase_memory_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, terminal = on_terminal(monkeypatch)
    with watch:
        watch.phase("load [8192] tokens", 2, 3)
        watch.memory(60 * MIB, 60 * MIB)
        watch.memory(50 * MIB, 60 * MIB)
    last = plain(terminal).rstrip().splitlines()[-1]
    assert all(word in last for word in ("load [8192] tokens", "1/3", "50.0 MiB (peak 60.0 MiB)")), last


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, terminal = on_terminal(monkeypatch, NO_COLOR="1")
    act(watch)
    assert "100.0 MiB" in terminal.getvalue()
    assert not re.search(r"\x1b\[(?:\d+;)*3[0-7]", terminal.getvalue())


def test_a_narrow_terminal_has_the_figures_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, terminal = on_terminal(monkeypatch, columns=40)
    with watch:
        watch.phase("load 8192 tokens", 2, 3)
        watch.memory(50 * MIB, 60 * MIB)
        watch.point(8192, 512, 100 * MIB, None)
    lines = plain(terminal).splitlines()
    assert max(map(len, lines)) <= 40
    assert any("50.0 MiB" in line for line in lines)
    assert any("8,192 tokens  100.0 MiB" in line for line in lines)
    assert not any("━" in line or "▁" in line for line in lines)


def plain(terminal: Terminal) -> str:
    """What was drawn, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue().replace("\r", "\n"))


def test_what_cannot_draw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = on_terminal(monkeypatch, TERM="dumb")
    assert not isinstance(watch, Live)
    assert not isinstance(watcher(quiet=True), Live)


def test_a_log_gets_one_line_for_each_thing_that_happened(capsys: pytest.CaptureFixture[str]) -> None:
    watch = watcher(quiet=False)
    assert not isinstance(watch, Live)
    act(watch)
    assert capsys.readouterr().err.splitlines() == [
        "target host: made �[31mup",
        "[1/3] load 4096 tokens",
        "      4,096 tokens at batch 512  116.0 MiB",
        "[2/3] load [8192] tokens",
        "      8,192 tokens at batch 512  132.0 MiB  = 100.0 MiB + 4.000 KiB/token",
        "[3/3] load 16384 tokens",
        "  timing",
        "     16,384 tokens at batch 512   90.0 MiB  (only 3 of 4 layers are on the GPU)",
    ]


def test_a_curve_runs_from_nothing_to_the_peak() -> None:
    assert curve([0, 50, 100], 100).strip() == "▁▅█"
    assert curve([7], 0).strip() == "▁"
