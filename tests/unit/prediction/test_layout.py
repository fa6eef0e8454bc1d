"""Layers over several devices: llama.cpp's own arithmetic, and what its b11434 printed for two ``ggml-rpc-server``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.prediction.layout import DevicePart, Layout, Memory, default_split, fit, pipelined, refit, steps


def dense(sizes: list[float], compute: float = 0.0) -> Memory:
    """Devices hold the layers given to them, the last of the list being the output, and their compute buffers."""

    def held(layout: Layout) -> list[float]:
        first, found = len(sizes) - sum(part.layers for part in layout), []
        for part in layout:
            found.append(sum(sizes[first : first + part.layers]) + compute)
            first += part.layers
        return found

    return held


def experts(layers: int, dense_size: float, expert_size: float, output: float) -> Memory:
    """The same for layers whose experts can lie on the host; a third of them is one projection."""
    kept = {"dense": 0.0, "attention": 0.0, "up": 1 / 3, "gate": 2 / 3}

    def held(layout: Layout) -> list[float]:
        total = layers + 1
        first, found, passed_on = total - sum(part.layers for part in layout), [], 0.0
        for part in layout:
            own = range(first, first + part.layers)
            size = sum(dense_size if one < layers else output for one in own)
            size += sum(expert_size for one in own if one < min(first + part.full, layers)) + passed_on
            passed_on = 0.0
            if part.partial and part.fraction != "dense":
                size += kept[part.fraction] * expert_size
                passed_on = (1 - kept[part.fraction]) * expert_size
            found.append(size)
            first += part.layers
        return found

    return held


def counts(layout: Layout) -> list[int]:
    return [part.layers for part in layout]


@pytest.mark.parametrize(
    ("total", "shares", "layers"),
    [
        (19, [23863 + 241, 23677 + 427], [10, 9]),
        (25, [24.0, 24.0], [13, 12]),
        (33, [24.0, 12.0], [22, 11]),
        (33, [24.0, 24.0, 24.0], [11, 11, 11]),
        (33, [0.0, 24.0], [0, 33]),
        (10, [1.0, 0.0], [10, 0]),
    ],
)
def test_the_default_split_goes_by_free_memory(total: int, shares: list[float], layers: list[int]) -> None:
    assert counts(default_split(total, shares)) == layers


def test_layers_on_the_host_are_the_first_ones() -> None:
    assert counts(default_split(33, [24.0, 24.0], gpu_layers=20)) == [10, 10]
    assert counts(default_split(33, [24.0, 24.0], gpu_layers=0)) == [0, 0]


def test_without_memory_there_is_no_split() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        default_split(33, [0.0, 0.0])


def test_a_split_that_meets_every_target_is_kept_and_one_byte_more_fills_the_last_device_first() -> None:
    memory = dense([10.0] * 24)
    split = default_split(24, [200.0, 200.0])

    assert counts(fit(split, [120.0, 120.0], memory, experts=False)) == [12, 12]
    assert counts(fit(split, [119.0, 200.0], memory, experts=False)) == [4, 20]


def test_a_sum_that_is_enough_does_not_help_a_device_that_is_short() -> None:
    """A model of 240 on 119 + 119 and on 100 + 145: the sum is above it in the second case, and a layer still goes."""
    memory = dense([20.0] * 12)
    split = default_split(12, [1.0, 1.0])

    assert sum(counts(fit(split, [100.0, 145.0], memory, experts=False))) == 12
    assert counts(fit(split, [99.0, 145.0], memory, experts=False)) == [4, 7]


def test_the_output_layer_lies_on_the_last_device() -> None:
    memory = dense([1.0] * 10 + [50.0])

    assert counts(fit(default_split(11, [1.0, 1.0]), [100.0, 52.0], memory, experts=False)) == [8, 3]


def test_experts_come_back_to_the_first_device_first() -> None:
    memory = experts(layers=10, dense_size=1.0, expert_size=9.0, output=2.0)
    layout = fit(default_split(11, [1.0, 1.0]), [35.0, 30.0], memory, experts=True)

    assert sum(counts(layout)) == 11
    assert layout[0].full >= layout[1].full - 1
    assert all(held <= target for held, target in zip(memory(layout), [35.0, 30.0], strict=True))


@pytest.mark.parametrize(("room", "fraction"), [(0.5, "attention"), (3.0, "attention"), (3.1, "up"), (6.1, "gate")])
def test_a_part_of_one_more_layer_is_kept(room: float, fraction: str) -> None:
    """Strictly below the target, as the engine compares it."""
    memory = experts(layers=10, dense_size=1.0, expert_size=9.0, output=2.0)
    (part,) = fit(default_split(11, [1.0]), [12.0 + 9.0 * 3 + room], memory, experts=True)

    assert part == DevicePart(layers=11, partial=8, fraction=fraction)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "on"),
    [
        ((DevicePart(10), DevicePart(9)), True),
        ((DevicePart(0), DevicePart(19)), True),
        ((DevicePart(19),), False),
        ((DevicePart(9), DevicePart(9)), False),
        ((DevicePart(10), DevicePart(9, 3)), False),
    ],
)
def test_pipeline_parallelism_needs_every_layer_whole_on_devices(layout: Layout, on: bool) -> None:
    assert pipelined(layout, 19) is on


def test_where_memory_grows_evenly_no_other_split_holds_more() -> None:
    sizes = [7.0, 5.0, 9.0, 4.0, 6.0, 8.0, 5.0, 12.0]
    memory = dense(sizes, compute=3.0)
    layout = fit(default_split(8, [1.0, 1.0]), [18.0, 22.0], memory, experts=False)

    def most_on_last(fits: Callable[[int], bool]) -> int:
        return max(count for count in range(9) if fits(count))

    assert layout[1].layers == most_on_last(lambda n: sum(sizes[8 - n :]) + 3.0 <= 22.0)
    assert all(held <= target for held, target in zip(memory(layout), [18.0, 22.0], strict=True))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kink", [0.0, 9.5, 30.0])
def test_the_steps_are_where_the_search_ends_with_another_layout(moe: bool, kink: float) -> None:
    """``kink``: by so much more compute is needed with three or six layers there, so that more layers take less."""
    plain = experts(layers=10, dense_size=2.3, expert_size=6.7, output=3.0) if moe else dense([4.2] * 10 + [3.0])

    def memory(layout: Layout) -> list[float]:
        return [plain(layout)[0] + (kink if layout[0].layers in (3, 6) else 0.0)]

    found = list(steps(11, memory, experts=moe))
    assert [start for start, _ in found] == sorted(start for start, _ in found)
    asked = 0
    for target in range(140):
        layout = [layout for start, layout in found if start <= target][-1]
        if layout is not None:
            assert refit((DevicePart(11),), (target,), memory, experts=moe) == layout, target
            asked += 1
    assert asked == 140 if not kink else 100 < asked <= 140
