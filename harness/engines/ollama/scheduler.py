"""Ollama's scheduler played through: which cards a model gets, at which batch, and whose place it takes.

Source: Ollama ``server/sched.go`` (``processPending``, ``load``, ``selectLlamaServerPlacement``, ``automaticGenerationBatch``,
``updateFreeSpace``, ``findRunnerToUnload``) and ``llm/llama_server.go`` (``PredictServerVRAM``, ``mmprojFitTargetMiB``), from
0.30 on, read at fb3076099 (0.33). Pure: cards and resident models go in, a decision with its reasons comes out, in the order in
which the scheduler thinks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from harness.prediction.rules import FIT_TARGET, Reason
from harness.units import GIB, MIB

#: Percent of a card's available memory that Ollama's own estimate may take (``load``, ``bestSingleGPUFit``).
FULL_PERCENT: Final = 80
#: Models per card that stay loaded (``defaultModelsPerGPU``) where ``OLLAMA_MAX_LOADED_MODELS`` is not set.
MODELS_PER_CARD: Final = 3
#: ``num_batch`` not set: context of all slots up to which a batch holds (``generationBatchForContext``).
BATCHES: Final = ((4096, 512), (32768, 1024), (1 << 30, 2048))
#: Percent of the available memory up to which the estimate lets a batch be, and what that batch adds to the estimate.
HEADROOM_PERCENT: Final = {2048: 60, 1024: 75}
SURCHARGE: Final = {2048: 2 * GIB, 1024: 768 * MIB}
_SMALL_CARD: Final = 8 * GIB


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as Ollama lists it. ``library`` groups cards (``CUDA``, ``ROCm``, ``Vulkan``); bytes."""

    name: str
    free_bytes: int
    total_bytes: int
    library: str = "CUDA"
    integrated: bool = False


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model and what it takes of each card, by name; bytes. Shorter ``keep_alive_s`` goes first."""

    name: str
    on_cards: dict[str, int]
    keep_alive_s: float = 300.0


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The server's environment: ``OLLAMA_MAX_LOADED_MODELS`` (0: not set), ``OLLAMA_SCHED_SPREAD``, free system memory."""

    max_loaded: int = 0
    spread: bool = False
    system_free_bytes: int | None = None


class SchedulerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A model to load. ``estimate_bytes`` is Ollama's own (file size and f16 cache of all ``cells``), without any batch.

    ``num_batch``, ``main_gpu`` and ``gpu_layers`` where they were given; ``layers_total`` counts the output layer.
    """

    name: str
    estimate_bytes: int
    cells: int
    flash_attention: bool = True
    completion: bool = True
    num_batch: int | None = None
    main_gpu: int | None = None
    gpu_layers: int | None = None
    layers_total: int | None = None
    projector_bytes: int = 0


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What Ollama will do: the cards that llama-server sees, its batch, what each must keep free, who is ended for it."""

    cards: tuple[str, ...]
    num_batch: int
    fit_target_bytes: int
    evicted: tuple[str, ...]
    reasons: tuple[Reason, ...]


def automatic_batch(cells: int) -> int:
    """``num_batch`` where it is unset, by the context of all slots; less where memory is tight."""
    return next((batch for limit, batch in BATCHES if cells <= limit), BATCHES[-1][1])


def decide(
    request: SchedulerRequest,
    cards: Sequence[Card],
    residents: Sequence[Resident] = (),
    settings: SchedulerSettings | None = None,
) -> Decision:
    """What Ollama does with a request, in the state it is asked in.

    ``free_bytes`` of the cards is what the driver reports with all residents loaded. A model that is ended gives back what
    :class:`Resident` says; requests that keep a model busy are not known here.
    """
    settings = settings or SchedulerSettings()
    loaded = sorted(residents, key=lambda one: (one.keep_alive_s, one.name))
    freed: dict[str, int] = {}
    reasons: list[Reason] = []
    evicted: list[str] = []

    def evict(step: Literal["evict-limit", "evict-memory"], **figures: int) -> None:
        gone = loaded.pop(0)
        evicted.append(gone.name)
        reasons.append(Reason(step=step, model=gone.name, figures=figures))
        for name, taken in gone.on_cards.items():
            freed[name] = freed.get(name, 0) + taken

    limit = settings.max_loaded or MODELS_PER_CARD * max(len(cards), 1)
    while True:
        if len(loaded) >= limit:
            evict("evict-limit", limit=limit)
            continue
        now = [_updated(card, loaded, freed.get(card.name, 0)) for card in cards]
        chosen, thinking = _select(request, now, settings)
        available = _available_sum(chosen, settings)
        batch, batch_reasons = _batch(request, chosen, available)
        predicted = request.estimate_bytes + (surcharge(batch) if request.completion else 0)
        partial = request.gpu_layers and request.layers_total and 0 < request.gpu_layers < request.layers_total
        if not loaded or partial or not chosen or predicted <= available * FULL_PERCENT // 100:
            break
        evict("evict-memory", estimate=predicted, available=available, percent=FULL_PERCENT)
    reasons += [*thinking, *batch_reasons]
    if loaded and chosen:
        reasons.append(Reason(step="fits-beside", figures={"estimate": predicted, "available": available}))
    target = FIT_TARGET
    if request.projector_bytes:
        target = -(-(request.projector_bytes + GIB) // MIB) * MIB
        reasons.append(Reason(step="fit-target", figures={"projector": request.projector_bytes, "target": target}))
    return Decision(
        cards=tuple(card.name for card in chosen),
        num_batch=batch,
        fit_target_bytes=target,
        evicted=tuple(evicted),
        reasons=tuple(reasons),
    )


def _updated(card: Card, loaded: Sequence[Resident], freed: int) -> Card:
    """Free memory as ``updateFreeSpace`` has it: the smaller of what is reported and the total less what models take."""
    booked = sum(one.on_cards.get(card.name, 0) for one in loaded)
    free = min(card.free_bytes + freed, card.total_bytes - booked, card.total_bytes)
    return msgspec.structs.replace(card, free_bytes=max(free, 0))


def _available(card: Card, settings: SchedulerSettings) -> int:
    system = settings.system_free_bytes
    return min(card.free_bytes, system) if card.integrated and system else card.free_bytes


def _available_sum(cards: Sequence[Card], settings: SchedulerSettings) -> int:
    shared = sum(card.free_bytes for card in cards if card.integrated)
    if settings.system_free_bytes:
        shared = min(shared, settings.system_free_bytes)
    return shared + sum(card.free_bytes for card in cards if not card.integrated)


def _select(
    request: SchedulerRequest, cards: Sequence[Card], settings: SchedulerSettings
) -> tuple[tuple[Card, ...], list[Reason]]:
    """``selectLlamaServerPlacement``: one card where the estimate fits on one, else the best group of one library."""
    if request.gpu_layers == 0 or not cards:
        return (), [Reason(step="host-only")]
    if len(cards) == 1:
        return tuple(cards), [Reason(step="one-card", cards=(cards[0].name,))]
    groups: dict[str, list[Card]] = {}
    for card in cards:
        groups.setdefault(card.library, []).append(card)

    def better(card: Card) -> tuple[bool, int]:
        return not card.integrated, _available(card, settings)

    if request.main_gpu is not None:
        given = [group[request.main_gpu] for group in groups.values() if 0 <= request.main_gpu < len(group)]
        if given:
            card = max(given, key=better)
            return (card,), [Reason(step="main-gpu", cards=(card.name,), figures={"main_gpu": request.main_gpu})]
    elif settings.spread:
        pass
    elif fitting := _fitting(request.estimate_bytes, groups, lambda card: _available(card, settings)):
        card = max(fitting, key=better)
        figures = {"estimate": request.estimate_bytes, "available": _available(card, settings), "percent": FULL_PERCENT}
        return (card,), [Reason(step="single-card", cards=(card.name,), figures=figures)]
    group = max(
        groups.values(), key=lambda group: (any(not card.integrated for card in group), _available_sum(group, settings))
    )
    most = max((card for group in groups.values() for card in group), key=lambda card: _available(card, settings))
    if request.main_gpu is not None:
        reasons = [Reason(step="main-gpu-missing", figures={"main_gpu": request.main_gpu})]
    elif settings.spread:
        reasons = [Reason(step="spread-set")]
    else:
        figures = {"estimate": request.estimate_bytes, "available": _available(most, settings), "percent": FULL_PERCENT}
        reasons = [Reason(step="no-single-card", cards=(most.name,), figures=figures)]
    reasons.append(Reason(step="spread", cards=tuple(card.name for card in group)))
    if len(group) < len(cards):
        left = tuple(card.name for card in cards if card not in group)
        reasons.append(Reason(step="other-group", cards=left))
    return tuple(group), reasons


def _fitting(estimate: int, groups: dict[str, list[Card]], available: Callable[[Card], int]) -> list[Card]:
    """Cards on which the estimate is at most 80 % of what is available; none where there is no estimate."""
    every = [card for group in groups.values() for card in group]
    return [card for card in every if estimate > 0 and estimate <= available(card) * FULL_PERCENT // 100]


def _batch(request: SchedulerRequest, cards: Sequence[Card], available: int) -> tuple[int, list[Reason]]:
    """``automaticGenerationBatch``; embeddings: as large as the context, up to 2 048."""
    if request.num_batch is not None:
        return request.num_batch, []
    if not request.completion:
        return min(2048, request.cells), []
    if not request.flash_attention and any(card.library == "CUDA" for card in cards):
        small = request.cells > 4096 and any(
            card.library == "CUDA" and 0 < (min(card.free_bytes, card.total_bytes) or card.total_bytes) <= _SMALL_CARD
            for card in cards
        )
        batch = 256 if small else 512
        return batch, [Reason(step="batch-no-flash-attention", figures={"batch": batch})]
    wanted = batch = automatic_batch(request.cells)
    while batch > 512 and not batch_fits(batch, request.estimate_bytes, available):
        batch //= 2
    figures = {"batch": batch, "cells": request.cells}
    if batch == wanted:
        return batch, [Reason(step="batch", figures=figures)]
    figures |= {"wanted": wanted, "estimate": request.estimate_bytes, "available": available}
    return batch, [Reason(step="batch-lowered", figures=figures)]


def batch_fits(batch: int, estimate: int, available: int) -> bool:
    """Whether a batch above 512 stays within its share of the memory (``generationBatchFits``); unknown memory allows any."""
    if not estimate or not available:
        return True
    limit = available * FULL_PERCENT // 100
    return estimate <= min(limit, available * HEADROOM_PERCENT[batch] // 100) and SURCHARGE[batch] <= limit - estimate


def surcharge(batch: int) -> int:
    """What a batch adds to the estimate, bytes (``generationBatchSurcharge``)."""
    return next((size for least, size in SURCHARGE.items() if batch >= least), 0)
