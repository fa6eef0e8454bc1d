"""What a plan asks for beyond what a file may set."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from harness.options import Allowed
from harness.store.catalog import pinned_image
from harness.store.trust import Refusal, refused_variables, require
from harness.sweep.matrix import Cell


def refuse_plan(cells: Collection[Cell], here: Path, allowed: Allowed, where: str) -> None:
    """Refuse to run a plan that asks for what a file may not set, unless it is allowed.

    Raises:
        NotPermittedError: something is left.
    """
    found = [one for cell in cells for one in _asked_by_cell(cell, here)]
    require(tuple(dict.fromkeys(found)), allowed, where)


def _asked_by_cell(cell: Cell, here: Path) -> tuple[Refusal, ...]:
    found = list(refused_variables(cell.env))
    if cell.image is not None and (cell.engine == "auto" or cell.image != pinned_image(cell.engine, here)):
        found.append(Refusal(what="image", value=cell.image, option="--allow-image"))
    if cell.models is not None:
        found.append(Refusal(what="models", value=cell.models, option="--allow-model"))
    if cell.engine_binary is not None:
        found.append(Refusal(what="engine_binary", value=cell.engine_binary, option="--allow-binary"))
    if cell.model.startswith(("https://", "http://")):
        found.append(Refusal(what="weights", value=cell.model, option="--allow-model"))
    return tuple(found)
