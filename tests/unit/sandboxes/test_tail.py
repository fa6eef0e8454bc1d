"""The last lines of a log, as they are shown to people."""

from __future__ import annotations

from pathlib import Path

from harness.sandboxes.tail import last_lines


def test_the_last_lines_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"line %d\n\n" % number for number in range(50_000)) + b"x" * 1000 + b"\n\xff unfinished")

    assert last_lines(log, 3, width=10) == ("line 49999", "x" * 10, "\N{REPLACEMENT CHARACTER} unfinish")


def test_no_log_has_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "missing") == ()
