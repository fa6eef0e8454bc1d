"""Text that harness did not write: made safe to show, and read as a version. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

#: Escape sequences: ECMA-48 CSI and OSC.
_ESCAPES: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
#: The part of a URL that names a user, with or without a password (RFC 3986, userinfo).
_LOGIN: Final = re.compile(rb"(?<=://)[^\s/@\"'<>]{1,512}(?=@)")
_ESCAPED_BYTES: Final = re.compile(r"(?:%[0-9A-F]{2})+")
#: What stands for a character that an encoding lacks; "?" for any other.
_PLAIN: Final = {
    "–": "-",
    "×": "x",
    "·": "|",
    "…": "...",
    "→": "->",
    "±": "+-",
    "█": "#",
    "▓": "=",
    "░": ".",
    "▒": "-",
    "▞": "/",
    "▚": "\\",
    "─": "-",
    "│": "|",
    **dict(zip("▁▂▃▄▅▆▇█", "_.-:=+*#", strict=True)),
}
_NO_WORD: Final = re.compile(r"[^A-Za-z0-9._-]+")
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


def plain_characters(error: UnicodeError) -> tuple[str, int]:
    """A handler of encoding errors (``codecs.register_error``): what a stream of ASCII or Latin-1 shows of what it lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(one, "?") for one in error.object[error.start : error.end]), error.end


def written(name: str) -> str:
    """An id or a file's stem as people write it: its escaped bytes (``%20``) are characters again."""
    return clean(_ESCAPED_BYTES.sub(lambda found: bytes.fromhex(found[0].replace("%", "")).decode(errors="replace"), name))


def word_of(text: str) -> str:
    """A text as a word of a file name or a variant: what is no letter, digit, ``.``, ``_`` or ``-`` becomes ``-``."""
    return _NO_WORD.sub("-", text)


def counted(number: int, one: str) -> str:
    """``1 load``, ``2 loads``, ``10,000 loads``."""
    return f"{number:,} {one if number == 1 else f'{one}s'}"


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
