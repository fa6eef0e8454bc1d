"""What a log says of each load, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from harness.logs.hints import missing
from harness.model.facts import LoadFacts
from harness.render.tables import Column, Drawn, Table
from harness.text import clean, counted
from harness.units import KIB, format_size

_PARTS: Final = ("weights", "kv_cache", "recurrent", "compute", "output", "projector", "lora")
_COLUMNS: Final = (
    Column("device", right=False),
    Column("kind", right=False, rank=1),
    *(Column({"kv_cache": "KV cache", "lora": "LoRA"}.get(part, part)) for part in _PARTS),
)


def loads_text(loads: Sequence[LoadFacts]) -> Iterator[str | Drawn]:
    """Each load in the log's order."""
    for number, facts in enumerate(loads, 1):
        yield from _load(number, facts)
    if not loads:
        yield "no load of a model is in this log"


def _load(number: int, facts: LoadFacts) -> Iterator[str | Drawn]:
    state = "failed" if facts.failed else "complete" if facts.complete else "incomplete"
    layers = "" if facts.layers_total is None else f" · {facts.layers_offloaded}/{facts.layers_total} layers on GPU"
    yield (
        clean(
            f"load {number} · {facts.engine} ({facts.dialect}) · {state}{layers}"
            + (" · estimated" if facts.estimated else "")
            + (f" · figures ± {format_size(facts.uncertainty_bytes)}" if facts.uncertainty_bytes else "")
        )
    )
    batch = "–" if facts.num_batch is None else f"{facts.num_batch:,}"
    yield (
        clean(
            f"  {facts.model or 'model unknown'} · "
            f"{_counted(facts.context_cells, 'cell')} · {_counted(facts.parallel, 'slot')} · "
            f"batch {batch} · KV {facts.kv_cache_type or '–'} · flash attention {facts.flash_attention or '–'}"
        )
    )
    if facts.vllm is not None:
        vllm = facts.vllm
        times = "–" if vllm.max_concurrency is None else f"{vllm.max_concurrency:g}"
        length = f"{vllm.max_model_len:,}" if vllm.max_model_len else "–"
        tokens = f"{vllm.kv_tokens:,}" if vllm.kv_tokens is not None else "–"
        yield (clean(f"  vLLM {vllm.version or '–'} · {tokens} tokens of KV cache · {times} requests of {length} tokens"))
    if facts.failure:
        yield (clean(f"  {facts.failure}"))
    if facts.devices:
        rows = [
            (clean(name), device.kind, *(format_size(getattr(device, f"{part}_bytes")) for part in _PARTS))
            for name, device in facts.devices.items()
        ]
        yield Table(_COLUMNS, rows, indent=2)
    for note in notes(facts):
        yield (clean(f"  {note}"))


def _counted(number: int | None, what: str) -> str:
    return counted(number, what) if number else f"– {what}s"


def notes(facts: LoadFacts) -> Iterator[str]:
    """What people look for in a log, beside the table."""
    whole = [cache for cache in facts.caches if cache.role == "full" and cache.cells and cache.total_bytes]
    cells = None if facts.in_blocks else facts.context_cells
    if whole:
        cache = max(whole, key=lambda one: one.total_bytes)
        a_token = cache.total_bytes / ((cache.cells or 1) * cache.streams)
        others = sum(one.total_bytes for one in facts.caches) - cache.total_bytes
        beside = f", and {format_size(others)} in window and draft caches" if others else ""
        yield f"KV cache: {a_token / KIB:.3f} KiB/token{beside}"
    elif cells and (size := facts.total("kv_cache_bytes")):
        yield f"KV cache: about {size / cells / KIB:.3f} KiB/token"
    if host := facts.total("weights_bytes", "host"):
        mapped = facts.fully_offloaded and "CPU_Mapped" in facts.devices
        yield f"weights on the host: {format_size(host)}" + (
            " (CPU_Mapped beside a full offload is the model's file, mapped: no memory of its own)" if mapped else ""
        )
    for name, size in facts.optional_bytes.items():
        yield f"without the {name}: {format_size(size)} less"
    if facts.overridden_tensors:
        yield f"{facts.overridden_tensors} tensors lie on the host by choice"
    if facts.sched_copies and facts.sched_copies > 1:
        yield f"pipeline parallelism: {facts.sched_copies} copies of the inputs on each device"
    if facts.fit is not None and facts.fit.projected_bytes is not None:
        free = "" if facts.fit.free_bytes is None else f" of {format_size(facts.fit.free_bytes)}"
        yield f"the engine's projection: {format_size(facts.fit.projected_bytes)}{free}"
    for doubt in facts.doubts:
        yield f"doubtful: {doubt}"
    if advice := missing(facts):
        yield advice
    if facts.unread.count:
        one = facts.unread.count == 1
        lines = "1 line speaks of memory and was" if one else f"{facts.unread.count} lines speak of memory and were"
        yield f"{lines} not understood (--unread prints them)"
