"""A table of the messages that are looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from harness.logs.unwrap import Message


class Row(NamedTuple):
    """One kind of message.

    ``sign``: words that it holds, without quotes and digits, so that no wrapping hides them. ``take(reader, message)`` answers
    whether it understood. ``source``: the file that prints it, first and last build. ``role``: a ``failure`` is only looked at
    where no fact was found; ``noise`` speaks of memory, and of no load.
    """

    sign: str
    take: Callable[[Any, Message], bool]
    source: str
    reader: Literal["llama", "vllm"] = "llama"
    role: Literal["fact", "failure", "noise"] = "fact"


def ignored(_reader: object, _message: Message) -> bool:
    """Take what is known, and no fact."""
    return True
