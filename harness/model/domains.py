"""What a field of an artifact or a record can be. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

#: No figure of an artifact or a record comes near it (bytes of a block, tokens, GiB).
_LARGEST: Final = 1e15
#: Characters of a text: no path, note or setting is longer.
_LONGEST: Final = 1 << 14
#: What ends a line, moves a cursor or turns the direction of a text round (Unicode: Cc, line and paragraph ends, bidi).
_CONTROL: Final = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")

#: Layers, GPUs, sequences: as many as there could be.
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
CountOrZero = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
#: Tokens of a context, or of a batch.
Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
#: GiB, up to a PiB; ``GrowthGb`` may fall, and a ``MemoryGb`` is not nothing.
SizeGb = Annotated[float, msgspec.Meta(ge=0, le=1 << 20)]
GrowthGb = Annotated[float, msgspec.Meta(ge=-(1 << 20), le=1 << 20)]
MemoryGb = Annotated[float, msgspec.Meta(gt=0, le=1 << 20)]
#: Seconds, and tokens per second.
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
#: Relative; of an error that was accepted (a fit ends with 5 at 1 %, and an estimate is not filed).
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
AcceptedError = Annotated[float, msgspec.Meta(ge=0, le=0.05)]
#: A name: what is not known is ``null``, never an empty text.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Digest = Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]
#: A day, as records begin their times (ISO 8601): by it one calibration is newer than another.
Date = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])(T|$)", max_length=64)]
RunName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9@%._+-]{1,255}$")]


def unsound(value: object, where: str = "$", *, texts: bool = True) -> str | None:
    """The first number that cannot be calculated with, or text that is too long or looks like two lines; ``None``: none.

    Without ``texts``, numbers alone are looked at. ``where`` is the path of the value.
    """
    return next(_unsound(value, where, texts=texts), None)


def _unsound(value: object, where: str, *, texts: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _unsound(key, f"a key of {where}", texts=texts)
            yield from _unsound(one, f"{where}.{key}", texts=texts)
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _unsound(one, f"{where}[{index}]", texts=texts)
    elif isinstance(value, str):
        if texts and _CONTROL.search(value):
            yield f"control characters - at `{where}`"
        elif texts and len(value) > _LONGEST:
            yield f"a text of {len(value):,} characters - at `{where}`"
    elif isinstance(value, int | float) and not abs(value) < _LARGEST:
        yield f"a number is out of range - at `{where}`"
