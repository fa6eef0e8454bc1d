"""A start that is known from its log alone: what of it can be fitted, and what else would have to be said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec

from harness.engines.policy import LoggedLoad
from harness.engines.vllm.blocks import ROUNDING, VllmStart
from harness.engines.vllm.fit import part_of
from harness.engines.vllm.releases import GRAPHS_IN_BUDGET, default_utilization
from harness.errors import BadInputError, UntrustedError
from harness.model.facts import LoadFacts, VllmFacts
from harness.model.record import Load, LoadRequest, VllmSettings
from harness.text import at_least
from harness.units import GIB, format_size

_DEBUG: Final = "start vLLM once more with VLLM_LOGGING_LEVEL=DEBUG, and import that log"
_CARD: Final = "add --gpu-memory SIZE, the memory of each GPU as nvidia-smi prints it, for example 24564MiB"
_HELD: Final = "add --total SIZE, what its processes hold on all GPUs together by nvidia-smi"
_NEWER: Final = "its engine V1 prints it since 0.9.1: start one of these, and import that log"
_WHOLE: Final = "import the log from its first line on: the engine prints its configuration before it loads the model"
#: torch counts up to so much less of a GPU than its driver does: 14.56 of 15.00 GiB of a T4, 139.81 of 140.40 of an H200.
_TORCH: Final = 0.03
#: More than this, or than a quarter of the GPU, beside weights and KV cache is no activation: another GPU was named.
_BESIDE: Final = 8 * GIB
#: Shares are printed with four decimals, and two are subtracted.
_SHARE_ROUNDING: Final = 0.0001


def imported(facts: LoadFacts, total: int | None, card: int | None) -> LoggedLoad:
    """What was asked of a start and the settings in force, as its log says.

    Args:
        facts: of the log.
        total: what all its processes held, bytes.
        card: the memory of each GPU by its driver, bytes.

    Raises:
        UntrustedError: the log lacks figures. BadInputError: the total is less than the KV cache and the weights, or the log
            contradicts the memory of the GPU.
    """
    notes: tuple[str, ...] = ()
    if card is not None and facts.vllm is not None:
        facts, notes = _with_card(facts, facts.vllm, card)
    said = facts.vllm or VllmFacts()
    start = VllmStart(Load(request=LoadRequest(context=1), outcome="ok", facts=facts), said)
    if missing := list(_missing(start, facts, total)):
        hints = list(dict.fromkeys(hint for _, hint in missing))
        raise UntrustedError(
            f"the log of vLLM does not say {'; '.join(what for what, _ in missing)}",
            hint="; ".join(hints),
            code="log-lacks-figures",
        )
    _refuse_small(start, total)
    request = LoadRequest(
        context=start.context,
        num_batch=facts.num_batch,
        utilization=None if said.kv_cache_memory_bytes is not None else said.utilization,
        kv_cache_bytes=_exact(said.kv_cache_memory_bytes),
    )
    settings = VllmSettings(
        model=facts.model or "", max_num_seqs=said.max_num_seqs or 1, enforce_eager=bool(said.enforce_eager)
    )  # fmt: skip
    if not said.max_num_seqs:
        notes += ("the log does not say how many sequences run at once: it answers for one",)
    if start.number is not None and said.num_gpu_blocks is None and said.block_size is None:
        notes += (f"the log does not name the tokens of a block: {start.block_size} at most, which are taken",)
    return LoggedLoad(facts, request, settings, notes)


def _with_card(facts: LoadFacts, said: VllmFacts, card: int) -> tuple[LoadFacts, tuple[str, ...]]:
    """The facts with what was requested: the utilisation of the GPU's memory. What the log says of either comes first."""
    _refuse_other_card(said, card)
    share, whence = said.utilization, "as the log says"
    if share is None and said.arguments_logged:
        share, whence = default_utilization(said.version), f"the default of vLLM {said.version}: its options set none"
    if said.requested_bytes is not None or said.kv_cache_memory_bytes is not None or share is None:
        return facts, ()
    whole = said.total_bytes or card
    requested = math.ceil(whole * share)
    given = msgspec.structs.replace(said, utilization=share, total_bytes=whole, requested_bytes=requested)
    known = [worker for worker in said.workers if worker.kv_available_bytes is not None]
    if not known:
        return msgspec.structs.replace(facts, vllm=given), ()
    budget = requested - min(worker.kv_available_bytes or 0 for worker in known)
    weights = max((worker.weights_bytes or 0 for worker in said.workers), default=0)
    in_budget = at_least(said.version, GRAPHS_IN_BUDGET)
    least = weights + max(((worker.cuda_graph_estimated_bytes or 0) if in_budget else 0 for worker in said.workers), default=0)
    if budget + 2 * ROUNDING < least:
        raise BadInputError(
            f"{share:g} of --gpu-memory {format_size(card)} leaves {format_size(budget)} beside the KV cache, and the log says "
            f"that {format_size(least)} were needed",
            hint=_CARD,
            code="gpu-memory-contradicts",
        )
    if budget - least > max(_BESIDE, card // 4):
        raise UntrustedError(
            f"{share:g} of --gpu-memory {format_size(card)} leaves {format_size(budget - least)} beside weights and KV "
            "cache: that is no activation",
            hint=f"{_CARD}; not the sum of several",
            code="gpu-memory-contradicts",
        )
    less = min(round(_TORCH * requested), max(budget - least, 0))
    note = (
        f"requested is {share:g} ({whence}) of the {format_size(card)} of --gpu-memory; torch counts up to 3 % less of a GPU "
        f"than its driver, so that base may be up to {format_size(less)} less, not more"
    )
    return msgspec.structs.replace(facts, vllm=given), (note,)


def _refuse_other_card(said: VllmFacts, card: int) -> None:
    """Refuse a memory that the log contradicts: it names the total, or what a known size is as a share of it."""
    low, high = 0.0, math.inf
    if said.total_bytes is not None:
        low, high = said.total_bytes - ROUNDING, said.total_bytes + ROUNDING
    elif said.graphs_share is not None:
        sizes = [size for worker in said.workers if (size := worker.cuda_graph_estimated_bytes) is not None]
        if sizes and said.graphs_share > _SHARE_ROUNDING:
            low = (min(sizes) - ROUNDING) / (said.graphs_share + _SHARE_ROUNDING)
            high = (max(sizes) + ROUNDING) / (said.graphs_share - _SHARE_ROUNDING)
    if not low <= card <= high * (1 + 2 * _TORCH):
        at_most = "more" if math.isinf(high) else format_size(round(high))
        raise BadInputError(
            f"--gpu-memory {format_size(card)} contradicts the log, by which a GPU has {format_size(round(low))} to {at_most}",
            hint=_CARD,
            code="gpu-memory-contradicts",
        )


def _exact(given: int | None) -> int | None:
    """The bytes that were asked for; ``None`` where they are what the log has rounded to 0.01 GiB."""
    return None if given is None or given == round(round(given / GIB, 2) * GIB) else given


def _gpus(said: VllmFacts) -> int:
    return max((said.tensor_parallel or 1) * (said.pipeline_parallel or 1), len(said.workers))


def _refuse_small(start: VllmStart, total: int | None) -> None:
    """Refuse a total that the KV cache and the weights of the log exceed."""
    said = start.facts
    weights = max((worker.weights_bytes or 0 for worker in said.workers), default=0)
    held = _gpus(said) * ((start.available or 0) + weights)
    if total is not None and total < held:
        raise BadInputError(
            f"--total {format_size(total)} is less than the {format_size(held)} of KV cache and weights",
            hint="a total is what all processes of the engine hold; a bare number is MiB, else 4.5GiB or 4.8GB",
            code="total-too-small",
        )


def _missing(start: VllmStart, facts: LoadFacts, total: int | None) -> Iterator[tuple[str, str]]:
    """What is missing, and what would tell it."""
    said = start.facts
    if said.kv_tokens is None:
        yield "the tokens of the KV cache", _DEBUG
    if said.max_concurrency is None or said.max_model_len is None:
        yield "the concurrency at its full length", _DEBUG
    if start.available is None:
        yield "what was available to the KV cache", _NEWER
    if facts.kv_cache_type is None:
        yield "the type of the KV cache (the line of its configuration)", _WHOLE
    spoke = sum(worker.kv_available_bytes is not None for worker in said.workers)
    if (said.pipeline_parallel or 1) > 1 and spoke < _gpus(said):
        yield "what each stage of its pipeline takes (one worker alone speaks)", _DEBUG
    host = any(device.kind == "host" for device in facts.devices.values())
    if total is None and host:
        yield "what its other processes hold on host memory", "add --total SIZE"
    if total is not None and not host:
        return  # what was held answers for all of the rest
    by_share = said.kv_cache_memory_bytes is None
    if by_share and start.available is not None and all(part_of(one, said, said.version) is None for one in said.workers):
        if said.utilization is None and not (said.arguments_logged and default_utilization(said.version)):
            yield "which share of the GPU was requested", _HELD
        else:
            yield "what was requested of the GPU", f"{_CARD}; or {_HELD.removeprefix('add ')}"
    if by_share and not said.enforce_eager and all(worker.cuda_graph_bytes is None for worker in said.workers):
        yield "what the CUDA graphs took", _HELD
    if not by_share and not host:
        yield "what was taken beside a KV cache that was given in bytes", _HELD
