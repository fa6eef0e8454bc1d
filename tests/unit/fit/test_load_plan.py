"""Plans are small and reach every band."""

from __future__ import annotations

from harness.fit.load_plan import plan_loads

OLLAMA = ((4096, 512), (32768, 1024), (1 << 31, 2048))


def test_an_engine_of_one_batch_loads_the_contexts_asked_for() -> None:
    assert [(one.context, one.num_batch) for one in plan_loads((8192, 16384, 32768), 131072)] == [
        (8192, 512),
        (16384, 512),
        (32768, 512),
    ]


def test_a_plan_shrinks_to_the_training_context_and_keeps_three_loads() -> None:
    contexts = [one.context for one in plan_loads((8192, 16384, 32768), 8192)]
    assert len(contexts) == 3
    assert max(contexts) == 8192


def test_three_bands_take_five_loads_with_three_in_the_band_of_the_largest_context() -> None:
    loads = plan_loads((8192, 16384, 32768), 131072, batch_limits=OLLAMA)
    assert len(loads) == 5
    assert [one.num_batch for one in loads] == [512, 1024, 2048, 2048, 2048]


def test_bands_that_a_model_cannot_reach_are_not_loaded() -> None:
    loads = plan_loads((8192, 16384, 32768), 32768, batch_limits=OLLAMA)
    assert {one.num_batch for one in loads} == {512, 1024}


def test_a_pinned_batch_is_sent_at_every_load() -> None:
    assert {one.num_batch for one in plan_loads((4096, 8192), None, num_batch=256, batch_limits=OLLAMA)} == {256}
