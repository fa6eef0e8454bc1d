"""Ollama's scheduler, against the cases of its own tests (``server/sched_test.go`` at fb3076099) and its rules in order."""

from __future__ import annotations

import msgspec
import pytest

from harness.engines.ollama.scheduler import (
    Card,
    Resident,
    SchedulerRequest,
    SchedulerSettings,
    decide,
)
from harness.units import GIB, MIB

GB = 10**9
ASKED = SchedulerRequest(name="asked", estimate_bytes=8 * GB, cells=4096)


def card(name: str, free: int, total: int | None = None, library: str = "CUDA", *, integrated: bool = False) -> Card:
    return Card(name=name, free_bytes=free, total_bytes=total or free, library=library, integrated=integrated)


def asked(**changes: object) -> SchedulerRequest:
    return msgspec.structs.replace(ASKED, **changes)


def steps(decision: object) -> list[str]:
    return [reason.step for reason in decision.reasons]  # type: ignore[attr-defined]


SYSTEM = SchedulerSettings(system_free_bytes=14 * GB)


@pytest.mark.parametrize(
    ("request_", "cards", "settings", "chosen"),
    [
        pytest.param(ASKED, [card("a", 10 * GB), card("b", 20 * GB)], SYSTEM, ("b",), id="one card, the emptiest"),
        pytest.param(
            asked(main_gpu=1),
            [card("a", 10 * GB), card("b", 20 * GB, library="ROCm"), card("c", 24 * GB, library="ROCm")],
            SYSTEM,
            ("c",),
            id="main_gpu in the group that has it",
        ),
        pytest.param(
            asked(estimate_bytes=12 * GB),
            [card("shared", 32 * GB, library="Metal", integrated=True), card("own", 16 * GB, library="Metal")],
            SYSTEM,
            ("own",),
            id="shared memory is no more than the system's",
        ),
        pytest.param(
            ASKED,
            [card("shared", 32 * GB, library="Vulkan", integrated=True), card("own", 10 * GB, library="Vulkan")],
            SYSTEM,
            ("own",),
            id="discrete before integrated",
        ),
        pytest.param(
            ASKED,
            [card("a", 10 * GB), card("b", 20 * GB)],
            msgspec.structs.replace(SYSTEM, spread=True),
            ("a", "b"),
            id="OLLAMA_SCHED_SPREAD",
        ),
        pytest.param(
            asked(estimate_bytes=30 * GB),
            [card("a", 10 * GB), card("b", 18 * GB), card("c", 12 * GB, library="ROCm")],
            SYSTEM,
            ("a", "b"),
            id="no single card: the group with the most",
        ),
        pytest.param(asked(gpu_layers=0), [card("a", 10 * GB), card("b", 20 * GB)], SYSTEM, (), id="num_gpu 0"),
    ],
)
def test_the_cards_that_a_model_gets(
    request_: SchedulerRequest, cards: list[Card], settings: SchedulerSettings, chosen: tuple[str, ...]
) -> None:
    assert decide(request_, cards, settings=settings).cards == chosen


@pytest.mark.parametrize(("estimate", "chosen"), [(8 * GB, ("b",)), (8 * GB + 1, ("a", "b"))])
def test_one_card_holds_up_to_80_percent_of_what_is_available(estimate: int, chosen: tuple[str, ...]) -> None:
    decision = decide(asked(estimate_bytes=estimate), [card("a", 9 * GB), card("b", 10 * GB)])

    assert decision.cards == chosen
    assert steps(decision)[0] == ("single-card" if len(chosen) == 1 else "no-single-card")


@pytest.mark.parametrize(
    ("cells", "estimate", "available", "flash", "batch"),
    [
        (4096, GIB, 100 * GIB, True, 512),
        (4097, GIB, 100 * GIB, True, 1024),
        (32768, GIB, 100 * GIB, True, 1024),
        (32769, GIB, 100 * GIB, True, 2048),
        (131072, 8 * GIB, 14 * GIB, True, 2048),
        (131072, 9 * GIB, 14 * GIB, True, 1024),
        (131072, 8 * GIB, 11 * GIB, True, 1024),
        (32768, 8500 * MIB, 11 * GIB, True, 512),
        (131072, 8 * GIB, 14 * GIB, False, 512),
        (131072, 3 * GIB, 6 * GIB, False, 256),
        (4096, 3 * GIB, 6 * GIB, False, 512),
        (131072, 3 * GIB, 8 * GIB, False, 256),
        (131072, 3 * GIB, 8 * GIB + 1, False, 512),
    ],
)
def test_the_batch_by_context_and_what_is_available(cells: int, estimate: int, available: int, flash: bool, batch: int) -> None:
    request_ = asked(cells=cells, estimate_bytes=estimate, flash_attention=flash)

    assert decide(request_, [card("a", available)]).num_batch == batch


def test_an_embedding_model_takes_its_context_as_batch() -> None:
    assert decide(asked(cells=1024, completion=False), [card("a", 20 * GB)]).num_batch == 1024
    assert decide(asked(cells=8192, completion=False), [card("a", 20 * GB)]).num_batch == 2048


def test_a_fourth_model_on_one_card_ends_the_one_with_the_shortest_stay() -> None:
    held = [Resident(name=name, on_cards={"a": GB}, keep_alive_s=stay) for name, stay in (("x", 300), ("y", 60), ("z", 300))]
    decision = decide(ASKED, [card("a", 77 * GB, 80 * GB)], held)

    assert decision.evicted == ("y",)
    assert decision.reasons[0].step == "evict-limit"
    assert decision.reasons[0].figures == {"limit": 3}


def test_max_loaded_models_takes_the_place_of_three_a_card() -> None:
    held = [Resident(name="x", on_cards={"a": GB})]
    cards = [card("a", 79 * GB, 80 * GB)]

    assert decide(ASKED, cards, held).evicted == ()
    assert decide(ASKED, cards, held, SchedulerSettings(max_loaded=1)).evicted == ("x",)


@pytest.mark.parametrize(("free", "evicted"), [(10 * GB, ()), (10 * GB - 10, ("x",))])
def test_models_end_when_the_estimate_is_above_80_percent_beside_them(free: int, evicted: tuple[str, ...]) -> None:
    decision = decide(ASKED, [card("a", free, 24 * GB)], [Resident(name="x", on_cards={"a": 4 * GB})])

    assert decision.evicted == evicted
    assert ("fits-beside" in steps(decision)) == (not evicted)


def test_an_idle_model_on_the_card_spreads_the_next_one_instead_of_ending() -> None:
    """The test for a single card comes before eviction (ollama #16599)."""
    cards = [card("a", 6 * GB, 24 * GB), card("b", 9 * GB, 12 * GB)]
    decision = decide(ASKED, cards, [Resident(name="x", on_cards={"a": 18 * GB})])

    assert decision.cards == ("a", "b")
    assert decision.evicted == ()


def test_what_models_are_booked_with_counts_when_the_driver_reports_more() -> None:
    """``updateFreeSpace``: the total less what runners take, where that is less than what is reported."""
    cards = [card("a", 24 * GB, 24 * GB), card("b", 11 * GB, 12 * GB)]
    decision = decide(ASKED, cards, [Resident(name="x", on_cards={"a": 15 * GB})])

    assert decision.cards == ("b",)


def test_layers_given_below_all_of_them_end_nobody() -> None:
    held = [Resident(name="x", on_cards={"a": 4 * GB})]
    cards = [card("a", 5 * GB, 24 * GB)]

    assert decide(asked(gpu_layers=10, layers_total=33), cards, held).evicted == ()
    assert decide(asked(gpu_layers=33, layers_total=33), cards, held).evicted == ("x",)


def test_a_projector_raises_what_every_card_keeps_free_by_its_size() -> None:
    decision = decide(asked(projector_bytes=1150 * MIB - 1), [card("a", 20 * GB), card("b", 20 * GB)])

    assert decision.fit_target_bytes == 2174 * MIB
    assert decide(ASKED, [card("a", 20 * GB)]).fit_target_bytes == 1024 * MIB


#: Ollama 0.33.0 over two devices of 3,072 and 2,048 MiB: tokens, whether OLLAMA_SCHED_SPREAD is set, devices and batch that it
#: took, by its log. Of each model what its file takes and a token of its estimate. OLLAMA_GPU_OVERHEAD of 1 GiB changed none.
DECIDED = {
    "qwen2": (773_993_815, 12_288, [
        (4096, False, "a", 512), (8192, False, "a", 1024), (32768, False, "a", 1024), (131_072, False, "a", 512),
        (4096, True, "ab", 512), (16384, True, "ab", 1024), (49152, True, "ab", 2048),
    ]),
    "llama": (622_057_685, 32_768, [
        (4096, False, "a", 512), (8192, False, "a", 1024), (32768, False, "a", 1024), (131_072, False, "ab", 512),
        (4096, True, "ab", 512), (16384, True, "ab", 1024), (49152, True, "ab", 1024),
    ]),
    "gemma3": (1_470_502_873, 29_952, [
        (4096, False, "a", 512), (8192, False, "a", 1024), (32768, False, "a", 512), (131_072, False, "ab", 512),
        (4096, True, "ab", 512), (16384, True, "ab", 1024), (49152, True, "ab", 1024),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("model", DECIDED)
def test_what_a_real_ollama_decided_over_two_devices(model: str) -> None:
    size, token, decided = DECIDED[model]
    cards = [card("a", 3072 * MIB, library="Vulkan"), card("b", 2048 * MIB, library="Vulkan")]
    for context, spread, names, batch in decided:
        decision = decide(
            asked(estimate_bytes=size + token * context, cells=context), cards, settings=SchedulerSettings(spread=spread)
        )
        assert ("".join(decision.cards), decision.num_batch) == (names, batch), context
