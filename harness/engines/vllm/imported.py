"""A start that is known from its log alone: what of it can be fitted, and what its log would have to say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from harness.engines.vllm.fit import VllmStart, part_of
from harness.errors import BadInputError, UntrustedError
from harness.model.facts import LoadFacts, VllmFacts
from harness.model.record import Load, LoadRequest, VllmSettings
from harness.units import format_size

_DEBUG: Final = "start vLLM once more with VLLM_LOGGING_LEVEL=DEBUG or with --block-size, and import that log"


def imported(facts: LoadFacts, total: int | None) -> tuple[LoadRequest, VllmSettings, tuple[str, ...]]:
    """What was asked of a start and the settings in force, as its log says. ``total`` is what all its processes held, bytes.

    Raises:
        UntrustedError: the log lacks figures. BadInputError: the total is less than the KV cache.
    """
    said = facts.vllm or VllmFacts()
    start = VllmStart(Load(request=LoadRequest(context=1), outcome="ok", facts=facts), said)
    if missing := list(_missing(start, facts, total)):
        raise UntrustedError(
            f"the log of vLLM does not say {'; '.join(missing)}",
            hint=_DEBUG,
            code="log-lacks-figures",
        )
    cache = sum(worker.kv_available_bytes or 0 for worker in said.workers)
    if total is not None and total < cache:
        raise BadInputError(
            f"--total {format_size(total)} is less than the {format_size(cache)} of the KV cache",
            hint="a total is what all processes of the engine hold; a bare number is MiB, else 4.5GiB or 4.8GB",
            code="total-too-small",
        )
    given = said.kv_cache_memory_bytes
    request = LoadRequest(
        context=start.context,
        num_batch=facts.num_batch,
        utilization=None if given is not None else said.utilization,
        kv_cache_bytes=given,
    )
    settings = VllmSettings(
        model=facts.model or "", max_num_seqs=said.max_num_seqs or 1, enforce_eager=bool(said.enforce_eager)
    )  # fmt: skip
    notes = () if said.max_num_seqs else ("the log does not say how many sequences run at once: it answers for one",)
    return request, settings, notes


def _missing(start: VllmStart, facts: LoadFacts, total: int | None) -> Iterator[str]:
    said = start.facts
    if start.block_size is None:
        yield "the tokens of a block (num_gpu_blocks or block_size)"
    if said.kv_tokens is None:
        yield "the tokens of the KV cache"
    if said.max_concurrency is None or said.max_model_len is None:
        yield "the concurrency at its full length"
    if facts.kv_cache_type is None:
        yield "the type of the KV cache (the line of its configuration)"
    by_share = said.kv_cache_memory_bytes is None
    if by_share and all(part_of(worker, said, said.version) is None for worker in said.workers):
        yield "what was requested and what of it was available to the KV cache"
    if by_share and not said.enforce_eager and all(worker.cuda_graph_bytes is None for worker in said.workers):
        yield "what the CUDA graphs took"
    if total is None and any(device.kind == "host" for device in facts.devices.values()):
        yield "what its other processes hold on host memory: give --total"
