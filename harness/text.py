"""Text that harness did not write: made safe to show, and read as a version. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

#: Escape sequences: ECMA-48 CSI and OSC.
_ESCAPES: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
#: The part of a URL that names a user, with or without a password (RFC 3986, userinfo).
_LOGIN: Final = re.compile(rb"(?<=://)[^\s/@\"'<>]{1,512}(?=@)")
_VERSION: Final = re.compile(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")


def clean(text: str, instead: str = "�") -> str:
    """``text`` fit for a terminal: ``instead`` stands for each character that cannot be printed.

    With ``""`` whole escape sequences go, as in a log with colours. Newlines and tabs stay; other spaces (no-break,
    ideographic) become plain ones.
    """
    if text.isprintable():
        return text
    return "".join(_printed(character, instead) for character in (text if instead else _ESCAPES.sub("", text)))


def _printed(character: str, instead: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return " " if unicodedata.category(character) == "Zs" else instead


def one_line(text: str, width: int = 400) -> str:
    """``text`` on one line of at most ``width`` characters, without what cannot be printed."""
    return " ".join(clean(text, "").split())[:width]


def mask(data: bytes, hidden: tuple[bytes, ...] = ()) -> bytes:
    """A log without secrets: ``hidden`` values, and user and password in any URL, become as many stars; nothing moves."""
    for value in hidden:
        data = data.replace(value, b"*" * len(value))
    return _LOGIN.sub(lambda found: b"*" * len(found[0]), data) if b"@" in data else data


def release(version: str | None) -> tuple[int, int, int] | None:
    """Major, minor and patch of ``0.33.0-rc1``, ``v0.10.1.1`` or ``0.32.0+cpu``; ``None`` where there is none (``b10434``)."""
    found = _VERSION.match(version or "")
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))


def at_least(version: str | None, first: tuple[int, int, int]) -> bool:
    """Whether a version is ``first`` or newer; an unknown one is not."""
    known = release(version)
    return known is not None and known >= first
