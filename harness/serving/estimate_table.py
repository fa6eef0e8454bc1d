"""Many models, contexts and cache types at once: what each would take, and the largest context of each that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.registry import EMBEDDED, policy_of, recipe_of
from harness.errors import HarnessError
from harness.headers.hub import quantization_of
from harness.headers.sources import Found, find, is_remote, open_client, variants
from harness.inventory.backend import header_address
from harness.inventory.machine import LocalMachine
from harness.prediction.host import HostMemory
from harness.prediction.together import judge_together
from harness.prediction.verdict import Outcome
from harness.serving.calibration_lookup import CalibrationFilter, CalibrationMatch, CheckRequest
from harness.serving.check import SOURCES, host_of
from harness.serving.estimates import Place, Readable, estimate_of, opened, place_of
from harness.store.catalog import Catalog, find_catalog, read_catalog
from harness.store.store import Store

#: Contexts of a table where none are asked for, tokens per slot.
CONTEXTS: Final = (8192, 32_768)
#: Share of the input embeddings of another quantisation that is taken to stay on the host: their type is not in the index.
_INPUT_SHARE: Final = 0.75


class EstimateCell(msgspec.Struct, frozen=True, kw_only=True):
    """One context of a row; bytes, as in ``check --json``."""

    context: int
    verdict: Outcome
    required_bytes: int | None
    uncertainty_bytes: int | None
    tight: bool
    host_growth_bytes: int | None


class EstimateRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model with one cache type. ``largest_context`` is 0 where none fits, ``None`` where no memory is known.

    ``source`` is ``estimated`` or ``formula``; ``error`` says why there is no estimate.
    """

    model: str
    name: str
    quantization: str | None = None
    file_bytes: int | None = None
    train_context: int | None = None
    kv_cache_type: str = "f16"
    source: str | None = None
    contexts: tuple[EstimateCell, ...] = ()
    largest_context: int | None = None
    error: str | None = None


class EstimateTable(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of :func:`estimates`; ``target`` and ``available_bytes`` are of the memory that was looked at."""

    target: str
    available_bytes: int | None
    reserve_bytes: int | None
    overhead: str
    rows: tuple[EstimateRow, ...]


def estimates(
    models: Sequence[str],
    store: Store,
    machine: LocalMachine,
    *,
    wanted: CalibrationFilter,
    contexts: Sequence[int] = (),
    kv_cache_types: Sequence[str] = (),
    num_parallel: int = 1,
    available: tuple[int, ...] | None = None,
) -> EstimateTable:
    """Estimates of files, addresses, repositories and names of a registry; one header is read for all quantisations of a model.

    A model whose header cannot be read is a row with its reason; where it is the only one, that is raised.

    Raises:
        HarnessError: nothing could be estimated.
    """
    place = place_of(machine, available)
    catalog = read_catalog(find_catalog(Path.cwd()))
    beside = partial(host_of, wanted=wanted, machine=machine, here=available is None)
    rows: list[EstimateRow] = []
    found: CalibrationMatch | None = None
    for model in models:
        try:
            for here in _headers(model, wanted, catalog):
                for kind in kv_cache_types or (policy_of(wanted.engine or EMBEDDED).default_cache_type,):
                    row, match = _row(model, here, kind, contexts or CONTEXTS, store, place, wanted, num_parallel, beside)
                    rows.append(row)
                    found = match or found
        except HarnessError as error:
            if len(models) == 1:
                raise
            rows.append(EstimateRow(model=model, name=model, error=error.message))
    free = place.available
    reserve = None
    if found is not None and place.target == "gpu":
        reserve = policy_of(found.calibration.engine).placement(found.calibration).reserve_bytes
    return EstimateTable(
        target=place.target,
        available_bytes=None if free is None else sum(free),
        reserve_bytes=reserve,
        overhead="" if found is None else found.warnings[0],
        rows=tuple(rows),
    )


def _headers(model: str, wanted: CalibrationFilter, catalog: Catalog) -> Iterator[tuple[Readable, Found | None]]:
    """What a name stands for: each model with a header; of a repository all quantisations behind the header of one."""
    engine = recipe_of(wanted.engine or EMBEDDED)
    name = header_address(model, engine, catalog)
    if name.endswith(".gguf") and not is_remote(name):
        with opened(name) as here:
            yield here, None
        return
    groups = _groups(variants(name))
    if not groups:
        with open_client() as client:
            groups = [[find(name, client, engine.name)]]
    for group in groups:
        with opened(name, group[0]) as here:
            for one in group:
                yield here, one


def _groups(found: Sequence[Found]) -> list[list[Found]]:
    """Quantisations of one model: files whose names differ in nothing else."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        quantization = quantization_of(one.name) or ""
        groups.setdefault(one.name.upper().replace(quantization, "", 1), []).append(one)
    return list(groups.values())


def _row(
    model: str, given: tuple[Readable, Found | None], kind: str, contexts: Sequence[int], store: Store, place: Place,
    wanted: CalibrationFilter, slots: int, beside: Callable[[Sequence[CalibrationMatch]], HostMemory],
) -> tuple[EstimateRow, CalibrationMatch | None]:  # fmt: skip
    here, one = given
    size = here.size if one is None or one.size is None else one.size
    own = one is None or one.name == here.name
    settings = msgspec.structs.replace(wanted, kv_cache_type=kind)
    train = here.header.field("context_length")
    usable = [context for context in contexts if not isinstance(train, int) or context <= train] or [train]
    question = CheckRequest(model=model, context=min(usable), num_parallel=slots)
    weights = None if own else size - here.header.begin * len(one.parts if one else ())
    match = estimate_of(here, question, store, place, settings, weights_bytes=weights, input_share=_INPUT_SHARE)
    calibration = match.calibration
    rules, host = policy_of(calibration.engine), beside([match])
    judged = [
        judge_together(
            [(calibration, context, slots, rules)], place.available, names=match.names, search=not number, host=host
        )[0][0]
        for number, context in enumerate(usable)
    ]  # fmt: skip
    cells = [
        EstimateCell(context=context, **{name: getattr(one, name) for name in EstimateCell.__struct_fields__[1:]})
        for context, one in zip(usable, judged, strict=True)
    ]
    return (
        EstimateRow(
            model=model,
            name=here.name if one is None else one.name,
            quantization=(one and one.quantization) or calibration.metadata.model.quantization,
            file_bytes=size,
            train_context=calibration.metadata.model.train_context,
            kv_cache_type=kind,
            source=None if match.method is None else SOURCES[match.method],
            contexts=tuple(cells),
            largest_context=judged[0].max_context,
        ),
        match,
    )
