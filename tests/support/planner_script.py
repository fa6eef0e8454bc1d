"""The planner of the report's page, in a JavaScript engine instead of a browser."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec

#: The engine inside is of 2021; browsers have had this since 2022.
_NEWER = "Array.prototype.at ??= function (at) { return this[at < 0 ? this.length + at : at]; };"


def planner_script(**values: object) -> Any:
    """A context of quickjs with ``planner``, and a constant for each value."""
    import quickjs

    context = quickjs.Context()
    context.eval(_NEWER)
    context.eval((files("harness.report") / "assets" / "planner.js").read_text(encoding="utf-8"))
    for name, value in values.items():
        context.eval(f"const {name} = {msgspec.json.encode(value).decode()};")
    return context
