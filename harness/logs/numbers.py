"""Numbers as engines, locales and people write them."""

from __future__ import annotations

import re
from typing import Final

from harness.units import GIB, MIB

#: A size; its point may be a comma (European locales) and its thousands may be grouped.
SIZE: Final = r"(?<![\d.,])(-?\d[\d.,]{0,17})"
#: A count, perhaps with grouped thousands.
COUNT: Final = r"(\d{1,3}(?:[,.]\d{3}){1,4}(?!\d)|\d{1,12}(?!\d))"
_GROUPED: Final = re.compile(r"-?[1-9]\d{0,2}(?:([.,])\d{3})(?:\1\d{3})*")


def number(text: str) -> float:
    """The value of a ``SIZE``: the last of two different marks is the decimal point; a comma before three digits groups."""
    text = text.rstrip(".,")
    if "," in text and "." in text:
        group = "," if text.rindex(".") > text.rindex(",") else "."
        text = text.replace(group, "")
    elif "," in text and _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    text = text.replace(",", ".")
    if text.count(".") > 1:
        text = text.replace(".", "")
    return float(text or 0)


def mib(text: str) -> int:
    """Bytes of a figure in MiB."""
    return round(number(text) * MIB)


def gib(text: str) -> int:
    """Bytes of a figure in GiB."""
    return round(number(text) * GIB)


def count(text: str) -> int:
    """The value of a ``COUNT``."""
    return int(text.replace(",", "").replace(".", ""))
