"""A sweep's plan: a matrix of calibrations with includes and excludes, as CI systems know it.

The rules are those of GitHub Actions' ``strategy.matrix``: every combination of the axes, less those that an entry of
``exclude`` matches; then each entry of ``include`` adds its values to every combination whose axes it does not contradict, or
stands as a cell of its own where it fits none.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from harness.engines.settings import shown_env
from harness.errors import BadInputError, UsageError
from harness.fit.load_plan import DEFAULT_CONTEXTS
from harness.options import CalibrationOptions, RunOptions, shared
from harness.text import word_of
from harness.units import parse_token_list

#: More cells than anybody means.
MAX_CELLS: Final = 10_000
Values = dict[str, Any]


class Cell(CalibrationOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One calibration of a sweep: its options, and ``machine``, the kind of machine that it needs.

    ``machine`` names a resource of a cluster's nodes; on a single machine it is ignored. Contexts and the batch stay as the
    plan spells them: the cell's title, key and variant are made of that.
    """

    model: str
    contexts: int | str | tuple[int, ...] = msgspec.field(default=(), name="ctx")  # type: ignore[assignment]
    num_batch: int | Literal["auto"] = "auto"  # type: ignore[assignment]
    machine: str | None = None

    def run_options(self) -> RunOptions:
        """What is calibrated.

        Raises:
            UsageError: an option has a value that it cannot have.
        """
        spelled = self.contexts
        try:
            contexts = spelled if isinstance(spelled, tuple) else parse_token_list(str(spelled))
        except ValueError as error:
            raise UsageError(f"--ctx: {error}") from error
        batch = None if self.num_batch == "auto" else self.num_batch
        return RunOptions(**{**shared(self), "contexts": contexts, "num_batch": batch})

    @property
    def key(self) -> str:
        """A name for files: the model, and a digest of everything that the cell asks for."""
        digest = hashlib.sha256(msgspec.json.encode(self.asked(), order="sorted")).hexdigest()[:12]
        return f"{word_of(self.model)[-60:]}-{digest}"

    @property
    def title(self) -> str:
        """What tells it apart, for people."""
        shown = self.public().asked()
        model = str(shown.pop("model"))
        words = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in shown.items()]
        return " ".join([model, *words])

    def public(self) -> Cell:
        """As it may be written: values of variables that are not known to be settings are left out."""
        return msgspec.structs.replace(self, env=shown_env(self.env))

    def asked(self) -> Values:
        """The options that are not at their defaults, as plain values."""
        plain: Values = msgspec.to_builtins(self)
        unset: Values = msgspec.to_builtins(Cell(model=self.model))
        return {name: value for name, value in plain.items() if name == "model" or value != unset[name]}


def read_plan(document: object, where: str, *, here: bool = False) -> tuple[Cell, ...]:
    """The cells of a plan: a mapping with ``matrix`` and/or ``include``, and optionally ``exclude`` and ``defaults``.

    With ``here`` everything runs on this machine: kinds of machines mean nothing, and cells that differ in it alone are one.

    Raises:
        BadInputError: it is no plan; the message names the key and the cell.
    """
    plan = _mapping(document, where)
    if unknown := plan.keys() - {"matrix", "include", "exclude", "defaults"}:
        raise _bad(f"{where}: unknown key {_words(unknown)} (known: defaults, exclude, include, matrix)")
    axes = {name: _axis(value, f"{where}: matrix.{name}") for name, value in _mapping(plan.get("matrix") or {}, where).items()}
    _known(axes, f"{where}: matrix")
    defaults = _mapping(plan.get("defaults") or {}, f"{where}: defaults")
    _known(defaults, f"{where}: defaults")
    excludes = _entries(plan.get("exclude"), f"{where}: exclude")
    includes = _entries(plan.get("include"), f"{where}: include")
    if stray := {name for entry in excludes for name in entry} - axes.keys():
        raise _bad(f"{where}: exclude names {_words(stray)}, which the matrix does not have")
    combinations = list(_combinations(axes, excludes, where))
    values = _included(combinations, includes, axes)
    cells = [_cell({**defaults, **one}, f"{where}, cell {number}") for number, one in enumerate(values, 1)]
    if not cells:
        raise _bad(f"{where}: the plan has no cell", hint="give a matrix with at least a model, or an include")
    if here:
        cells = [msgspec.structs.replace(cell, machine=None) for cell in cells]
    return _with_variants(cells, axes, where)


def _combinations(axes: Mapping[str, Sequence[Any]], excludes: Sequence[Values], where: str) -> Iterator[Values]:
    if not axes:
        return
    size = 1
    for choices in axes.values():
        size *= len(choices)
    if size > MAX_CELLS:
        raise _bad(f"{where}: the matrix has {size} cells; {MAX_CELLS} are the most")
    for chosen in itertools.product(*axes.values()):
        one = dict(zip(axes, chosen, strict=True))
        if not any(all(one[name] == value for name, value in entry.items()) for entry in excludes):
            yield one


def _included(combinations: list[Values], includes: Sequence[Values], axes: Mapping[str, Sequence[Any]]) -> list[Values]:
    found = [dict(one) for one in combinations]
    alone = []
    for entry in includes:
        original = {name: value for name, value in entry.items() if name in axes}
        matching = [
            extended
            for extended, one in zip(found, combinations, strict=True)
            if all(one[name] == value for name, value in original.items())
        ]
        for extended in matching:
            extended.update(entry)
        if not matching:
            alone.append(dict(entry))
    return found + alone


def _cell(values: Values, where: str) -> Cell:
    try:
        cell = msgspec.convert(values, Cell)
        cell.run_options()
    except (msgspec.ValidationError, UsageError) as error:
        raise _bad(f"{where} ({values.get('model', 'no model')}): {error}") from error
    return cell


def _with_variants(cells: list[Cell], axes: Mapping[str, Sequence[Any]], where: str) -> tuple[Cell, ...]:
    """Name variants, so that each cell writes a file of its own; equal cells are one.

    The first value of an axis is the default and adds nothing; the kind of machine always does, since it is another GPU.
    """
    targets: dict[tuple[str, str, str | None], Cell] = {}
    for cell in cells:
        named = cell if cell.variant else msgspec.structs.replace(cell, variant=_variant(cell, axes))
        other = targets.setdefault((named.engine, named.name or named.model, named.variant), named)
        if other != named:
            raise _bad(
                f"{where}: two cells would write the same calibration: {other.title}, and {named.title}",
                hint="give one of them a variant",
            )
    return tuple(targets.values())


def _variant(cell: Cell, axes: Mapping[str, Sequence[Any]]) -> str | None:
    parts = []
    asked, public = cell.asked(), cell.public().asked()
    for name, choices in axes.items():
        if name in ("model", "engine", "machine") or len(choices) < 2 or asked.get(name) in (None, choices[0]):
            continue
        value = public[name]
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(word_of(f"{'' if isinstance(value, str) else name}{text}").strip("-"))
    if cell.machine is not None:
        parts.append(word_of(cell.machine).strip("-"))
    return "-".join(parts) or None


def loads_of(cell: Cell) -> int:
    """How many loads the cell makes at least (bands of an automatic batch add some)."""
    return len(cell.run_options().contexts or DEFAULT_CONTEXTS) + 2 * cell.speed


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _bad(f"{where}: a mapping of names is expected, not {type(value).__name__}")
    return value


def _axis(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _bad(f"{where}: a list of at least one value is expected")
    return value


def _entries(value: object, where: str) -> list[Values]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _bad(f"{where}: a list is expected")
    entries = [dict(_mapping(one, where)) for one in value]
    for entry in entries:
        _known(entry, where)
    return entries


def _known(values: Mapping[str, Any], where: str) -> None:
    known = set(Cell.__struct_encode_fields__)
    if unknown := values.keys() - known:
        raise _bad(f"{where}: unknown option {_words(unknown)} (known: {', '.join(sorted(known))})")


def _words(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _bad(message: str, hint: str | None = None) -> BadInputError:
    return BadInputError(message, hint=hint, code="bad-plan")
