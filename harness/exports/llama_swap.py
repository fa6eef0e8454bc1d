"""llama-swap's configuration: a model each, and which of them may run at once (its ``config-schema.json``, 2026-10).

``cmd`` is split as a shell does (github.com/billziss-gh/golib/shlex); ``${NAME}`` in it is a macro, so no name may hold one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from harness.errors import UsageError
from harness.exports.entry import Entry, comments, document, unique


def write(entries: Sequence[Entry], style: str, together: Sequence[Sequence[int]]) -> str:
    """Models that fit together are not unloaded for each other: sets of a matrix, or one group of the largest of them."""
    names = unique([entry.model for entry in entries])
    models = {name: _model(entry) for name, entry in zip(names, entries, strict=True)}
    found: dict[str, Any] = {"models": models}
    if len(entries) > 1 and style == "matrix":
        variables = {f"m{index}": name for index, name in enumerate(names)}
        alone = [[index] for index in range(len(names)) if not any(index in some for some in together)]
        sets = {f"fit{number}": " & ".join(f"m{index}" for index in some) for number, some in enumerate([*together, *alone])}
        found["matrix"] = {"vars": variables, "sets": sets}
    elif len(entries) > 1:
        largest = max((list(some) for some in together), key=len, default=[])
        rest = [index for index in range(len(names)) if index not in largest]
        groups = {"together": (largest, False), "one-at-a-time": (rest, True)}
        found["groups"] = {
            group: {"swap": swap, "exclusive": True, "members": [names[index] for index in members]}
            for group, (members, swap) in groups.items()
            if members
        }
    return comments(entries) + document(found)


def _model(entry: Entry) -> dict[str, Any]:
    start = entry.start
    if start.port_option is None:
        raise UsageError(f"llama-swap starts one server for each model; {entry.key} is of one server for all", code="no-format")
    command = shlex.join((*start.program, *entry.words))
    for text in (command, entry.model, *start.variables.values()):
        if "${" in text:
            raise UsageError(f"{entry.model!r} holds what llama-swap takes for a macro", code="bad-name")
    found: dict[str, Any] = {"cmd": f"{command} {start.port_option} ${{PORT}}", "checkEndpoint": start.health}
    if start.variables:
        found["env"] = [f"{name}={value}" for name, value in start.variables.items()]
    return found
