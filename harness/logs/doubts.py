"""Whether a log agrees with itself: each check compares two things that it says, within what its rounding allows.

A check returns ``None`` where the log lacks one of the two. Agreement is recorded; a disagreement makes the load doubtful.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from harness.logs.parts import META, Cache
from harness.model.facts import device_kind
from harness.model.kv_types import VALUE_BYTES
from harness.units import MIB

if TYPE_CHECKING:
    from harness.logs.building import Building

#: Half of the last decimal of a figure in MiB with two.
_ROUNDING: Final = 0.005 * MIB


def _mib(size: float) -> str:
    return f"{size / MIB:.2f} MiB"


def _caches(load: Building) -> list[Cache]:
    return [cache for context in load.contexts() for cache in context.caches]


def cache_size(load: Building) -> str | bool | None:
    """A cache's ``size =`` line against the buffers of it."""
    agreed: bool | None = None
    for cache in _caches(load):
        if cache.total is None or not cache.devices or META in cache.devices:
            continue
        held = sum(cache.devices.values())
        if abs(held - cache.total) > _ROUNDING * (len(cache.devices) + 2):
            return f"the buffers of a KV cache sum to {_mib(held)}, its size line says {_mib(cache.total)}"
        agreed = True
    return agreed


def cache_halves(load: Building) -> str | bool | None:
    """A cache's size against its K and V."""
    agreed: bool | None = None
    for cache in _caches(load):
        if cache.total is None or cache.halves is None:
            continue
        if abs(sum(cache.halves) - cache.total) > 4 * _ROUNDING:
            return f"K and V of a KV cache sum to {_mib(sum(cache.halves))}, its size line says {_mib(cache.total)}"
        agreed = True
    return agreed


def cache_elements(load: Building) -> str | bool | None:
    """K and V of a cache against its cells and types: the elements of a cell are a whole number of 16, in every layer."""
    agreed: bool | None = None
    for cache in _caches(load):
        if not (cache.halves and cache.types and cache.cells):
            continue
        for kind, size in zip(cache.types, cache.halves, strict=True):
            one = VALUE_BYTES.get(kind, 0) * cache.cells * cache.streams
            if not one or (slack := _ROUNDING / one) > 2:
                continue
            elements = size / one
            if abs(elements - 16 * round(elements / 16)) > slack + 0.01:
                return f"{cache.cells * cache.streams} cells of {kind} do not make the {_mib(size)} that a KV cache has"
            agreed = True
    return agreed


def held_table(load: Building) -> str | bool | None:
    """The memory breakdown of an engine that ends against the buffers of each GPU (whole MiB, cut off)."""
    if (
        not load.own
        or load.projectors
        or any(model.draft for model in load.models)
        or any(one.draft for one in load.contexts())
    ):
        return None
    devices, agreed = load.devices(), None
    for row in load.held:
        device = devices.get(row.device)
        if device is None or device_kind(row.device) != "gpu":
            continue
        context = (device.kv_cache_bytes or 0) + (device.recurrent_bytes or 0) + (device.output_bytes or 0)
        pairs = (("weights", device.weights_bytes, row.model_bytes), ("context", context, row.context_bytes))
        for name, held, said in (*pairs, ("compute", device.compute_bytes, row.compute_bytes)):
            if held is None:
                continue
            if not -0.05 * MIB <= held - said <= 1.05 * MIB:
                return f"{name} on {row.device} sums to {_mib(held)}, the memory breakdown says {said // MIB} MiB"
            agreed = True
    return agreed


def projection(load: Building) -> str | bool | None:
    """The fit's projection against what is on the GPUs: 1 MiB a row and 0.5 %; only where it changed nothing.

    Over several devices that work at the same time it plans more compute than the load takes: one more copied input on each but
    the first (b11434: 100.04 planned, 84.04 MiB reserved; CUDA 684 and 652).
    """
    if not load.own or not load.nothing_overflows or load.projected is None or load.projectors or len(load.models) > 1:
        return None
    if not load.models[0].reserved or any(context.draft for context in load.contexts()) or load.failure is not None:
        return None
    parts = ("weights_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes", "output_bytes")
    gpus = [device for device in load.devices().values() if device.kind == "gpu"]
    held = sum(getattr(device, part) or 0 for device in gpus for part in parts)
    if not gpus or META in load.devices():
        return None
    near, planned = 4 * MIB * len(gpus) + 0.005 * held, load.projected - held
    if not -near <= planned <= near + sum(device.compute_bytes or 0 for device in gpus[1:]):
        return f"{_mib(held)} lie on the GPUs, the engine's projection was {_mib(load.projected)}"
    return True


def placed(load: Building) -> str | bool | None:
    """Whether every cache has a device, and every device its own figures."""
    if any(META in model.weights for model in load.models):
        return "split by tensors: buffer lines are the largest of the cards, so that weights and compute are unknown"
    unplaced = [cache for cache in _caches(load) if cache.total is not None and not cache.devices]
    if unplaced or any(one.kv_total is not None and not one.caches for one in load.contexts()):
        return "the log has the size of a KV cache and no line that says on which device it is"
    return None


CHECKS: Final[tuple[tuple[str, Callable[[Building], str | bool | None]], ...]] = (
    ("cache-size", cache_size),
    ("cache-halves", cache_halves),
    ("cache-elements", cache_elements),
    ("held-table", held_table),
    ("projection", projection),
    ("placement", placed),
)


def examine(load: Building) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the log contradicts, and the names of the checks that agree."""
    answers = {name: check(load) for name, check in CHECKS}
    doubts = tuple(f"{name}: {answer}" for name, answer in answers.items() if isinstance(answer, str))
    return doubts, tuple(name for name, answer in answers.items() if answer is True)
