"""A command line for a shell, variables before it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from harness.exports.entry import Entry, comments


def write(entries: Sequence[Entry], _style: str, _together: Sequence[Sequence[int]]) -> str:
    """A line for each model."""
    return "\n".join(comments([entry]) + line(entry) + "\n" for entry in entries)


def line(entry: Entry) -> str:
    """The command of one model."""
    env = [f"{name}={shlex.quote(value)}" for name, value in entry.start.variables.items()]
    return " ".join([*env, shlex.join((*entry.start.program, *entry.words))])
