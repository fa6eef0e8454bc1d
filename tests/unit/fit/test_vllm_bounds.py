"""Two starts of any model that vLLM has, whose logs name no blocks: what is concluded is never below what a sequence takes."""

from __future__ import annotations

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from harness.engines.vllm.blocks import VllmStart, fit_blocks
from harness.errors import UntrustedError
from harness.model.facts import VllmFacts, WorkerFacts
from harness.model.record import Load, LoadRequest
from harness.units import GIB

#: What a group of layers keeps: every token, those of a window (with a batch that is read at once), or blocks of a state.
GROUPS = st.lists(
    st.one_of(
        st.just(("every", 0)),
        st.tuples(st.just("window"), st.integers(512, 12_000)),
        st.tuples(st.just("state"), st.integers(1, 60)),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


def kept(groups: list[tuple[str, int]], size: int, context: int) -> int:
    """Blocks of one sequence (vllm/v1/kv_cache_interface.py, ``max_memory_usage_bytes``)."""
    every = -(-context // size)
    taken = 0
    for kind, figure in groups:
        window = -(-figure // size) + 1
        taken += figure if kind == "state" else min(every, window) if kind == "window" else every
    return taken


def start(context: int, blocks: int, page: int, cache: float) -> VllmStart:
    """As an INFO log of 0.25 describes it: the cache to 0.01 GiB, tokens that are the concurrency times the length."""
    times = int(cache * GIB) // page / blocks
    assume(times >= 1)
    said = VllmFacts(
        version="0.25.1", max_model_len=context, kv_tokens=int(times * context), max_concurrency=round(times, 2),
        workers=(WorkerFacts(kv_available_bytes=int(round(cache, 2) * GIB)),),
    )  # fmt: skip
    return VllmStart(Load(request=LoadRequest(context=context), outcome="ok"), said)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    groups=st.one_of(GROUPS, st.just([("every", 0)])),
    size=st.sampled_from((16, 32, 64, 128, 256)),
    page=st.sampled_from((4096, 65_536, 1 << 20)),
    lengths=st.lists(st.sampled_from((512, 1000, 2048, 4096, 6000, 8192, 16_384, 32_768)), min_size=2, max_size=2, unique=True),
    caches=st.tuples(st.floats(0.5, 40), st.floats(0.5, 40)),
    asked=st.lists(st.integers(1, 32_768), max_size=8),
)
@example(  # the shorter log rounds its cache down, the longer one up
    groups=[("every", 0), ("state", 23)], size=16, page=4096, lengths=[16_384, 32_768], caches=(0.5049, 0.5051), asked=[]
)
def test_no_context_up_to_the_longest_takes_more(
    groups: list[tuple[str, int]], size: int, page: int, lengths: list[int], caches: tuple[float, float], asked: list[int]
) -> None:
    starts = [start(one, kept(groups, size, one), page, cache) for one, cache in zip(lengths, caches, strict=True)]
    assume(all((one.available or 0) // page > 100 for one in starts))
    try:
        blocks = fit_blocks(starts, whole=True)
    except UntrustedError:
        return
    short, full = sorted(lengths)
    for context in {1, short - 1, short, short + 1, (short + full) // 2, full, *(one for one in asked if one <= full)}:
        assert blocks.of_sequence(context) * blocks.bytes >= kept(groups, size, context) * page, context
    assert blocks.of_sequence(full) * blocks.bytes <= 1.17 * kept(groups, size, full) * page
