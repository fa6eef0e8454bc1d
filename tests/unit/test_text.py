"""Text that harness did not write, as it is shown, and versions."""

from __future__ import annotations

import pytest

from harness.text import at_least, clean, mask, one_line, release

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x1b[0m\a\x9b2J and\x00 \r\x08\x7fmore\ttext\u202e\n"


def test_control_characters_cannot_reach_the_terminal() -> None:
    """Colours, titles, cursor moves, bells, C1 codes and changes of direction are gone; the words stay."""
    assert clean(HOSTILE, "") == "red2J and more\ttext\n"
    assert clean("gem\x1b[31mma\a") == "gem�[31mma�"
    assert clean("no\N{NO-BREAK SPACE}break") == "no break"


def test_a_message_of_an_engine_is_one_line() -> None:
    assert one_line(f"first\n\n  {HOSTILE} last", width=30) == "first red2J and more text last"
    assert one_line("x" * 1000) == "x" * 400


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.33.0-rc1", (0, 33, 0)),
        ("v0.10.1.1", (0, 10, 1)),
        ("0.32", (0, 32, 0)),
        ("0.19.2rc1.dev134+g5af684c31", (0, 19, 2)),
        ("b10434", None),
        ("", None),
        (None, None),
    ],
)
def test_versions_of_engines(text: str | None, found: tuple[int, int, int] | None) -> None:
    assert release(text) == found


def test_an_unknown_version_is_not_new_enough() -> None:
    assert at_least("0.20.0", (0, 20, 0))
    assert not at_least("0.19.9", (0, 20, 0))
    assert not at_least("main", (0, 0, 0))


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        (b"HTTPS_PROXY:http://u:p%40ss@proxy:3128 X:http://h/a@b", b"HTTPS_PROXY:http://********@proxy:3128 X:http://h/a@b"),
        (b"cloning https://ghp_0123@github.com/x", b"cloning https://********@github.com/x"),
        (b"token=hf_abcdefgh, hf_abcdefgh!", b"token=***********, ***********!"),
        (b"mail a@b at http://c \xff", b"mail a@b at http://c \xff"),
    ],
)
def test_secrets_in_a_log_become_as_many_stars(line: bytes, masked: bytes) -> None:
    assert mask(line, (b"hf_abcdefgh",)) == masked
    assert len(masked) == len(line)
