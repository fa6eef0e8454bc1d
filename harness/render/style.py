"""Colours of a terminal, as ANSI sequences; what prints them leaves them out where they are not wanted."""

from __future__ import annotations

from typing import Final

_COLOURS: Final = {"dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36}


def paint(text: str, colour: str | None = None, *, bold: bool = False, dim: bool = False) -> str:
    """Text in a colour, bold or dim (SGR, ECMA-48 8.3.117)."""
    codes = [_COLOURS[colour] if colour else 0, 1 if bold else 0, 2 if dim else 0]
    return "".join(f"\x1b[{code}m" for code in codes if code) + f"{text}\x1b[0m"
