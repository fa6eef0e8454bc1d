"""Which layer is on which device: llama.cpp's default split and its fit, over any number of devices.

Sources (llama.cpp b9222 to b11434): ``src/llama-model.cpp``, ``load_tensors`` (default split); ``common/fit.cpp``,
``common_params_fit_impl`` (steps 1, 3 and 4); ``src/llama-context.cpp`` (pipeline parallelism). Ollama from 0.30 on starts the
same program. What a device then holds is asked of a function (:data:`Memory`), so that this module knows
neither weights nor compute buffers.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise
from math import ceil, floor, inf
from typing import Literal, NamedTuple

#: How much of a partial layer stays on its device: no experts; attention; and its up; and its gate projection.
Fraction = Literal["dense", "attention", "up", "gate"]


class DevicePart(NamedTuple):
    """Consecutive layers on one device; the output layer counts as one.

    The last ``partial`` of them keep no experts there (``common/fit.cpp``, ``ngl_t``), the first of these keeps ``fraction``
    of its feed-forward weights; the rest of that one layer is on the next device, on the last device's host.
    """

    layers: int = 0
    partial: int = 0
    fraction: Fraction = "dense"

    @property
    def full(self) -> int:
        """Layers with everything on the device."""
        return self.layers - self.partial


#: Parts of the devices in the engine's order; what is left of the model, its first layers, is on the host.
Layout = tuple[DevicePart, ...]
#: Bytes that each device holds under a layout: weights, caches, compute buffers (the driver's own memory is not counted).
Memory = Callable[[Layout], Sequence[float]]


def pipelined(layout: Layout, total: int) -> bool:
    """Whether the scheduler keeps copies of its inputs (``GGML_SCHED_MAX_COPIES``) so that devices work at the same time.

    Only with more than one device in the list (also if no layer is on one), every layer and the output on devices, and no
    tensor placed by name (``src/llama-context.cpp``).
    """
    return len(layout) > 1 and sum(part.layers for part in layout) == total and not any(part.partial for part in layout)


def default_split(total: int, shares: Sequence[float], gpu_layers: int | None = None) -> Layout:
    """Layers by device before any fit: in proportion to free memory (or ``--tensor-split``), the output on the last.

    ``gpu_layers`` counts from the back (``-ngl``), all by default. Layers count alike, whatever their bytes. In 32-bit floats,
    as the engine compares them.

    Raises:
        ValueError: no device, or no share above zero.
    """
    if not shares or sum(shares) <= 0:
        raise ValueError("layers are split over at least one device with memory")
    running = [_float32(value) for value in accumulate(map(_float32, shares), lambda one, other: _float32(one + other))]
    bounds = [_float32(value / running[-1]) for value in running]
    count = total if gpu_layers is None else min(max(gpu_layers, 0), total)
    ends = [*(bisect_left(_fractions(count), bound) for bound in bounds[:-1]), count]
    return tuple(DevicePart(end - begin) for begin, end in pairwise((0, *ends)))


@cache
def _fractions(count: int) -> list[float]:
    """Where each layer stands from 0 to 1."""
    return [_float32(_float32(index) / count) for index in range(count)]


def _float32(value: float) -> float:
    result: float = struct.unpack("f", struct.pack("f", value))[0]
    return result


def fit(layout: Layout, targets: Sequence[float], memory: Memory, *, experts: bool) -> Layout:
    """The layout that llama.cpp's fit ends with, when neither layers nor split were given.

    Args:
        layout: the split tried first (:func:`default_split`), kept where every device meets its target.
        targets: bytes that each device may hold: free memory less its margin and the driver's own memory.
        memory: what each device holds under a layout.
        experts: whether the model has experts.

    Step 2 (a smaller context) is not played: the engine keeps a context that was asked for.
    """
    if all(held <= target for held, target in zip(memory(layout), targets, strict=True)):
        return layout
    return refit(layout, targets, memory, experts=experts)


def refit(layout: Layout, targets: Sequence[float], memory: Memory, *, experts: bool) -> Layout:
    """The same, once it is known that the first split misses a target."""
    filled = _back_to_front(sum(part.layers for part in layout), targets, memory, experts=experts)
    dense_only = tuple(part._replace(partial=part.layers) for part in layout)
    if experts and sum(targets) - sum(memory(dense_only)) > 0:
        return _front_to_back(filled, targets, memory)
    return filled


def _back_to_front(total: int, targets: Sequence[float], memory: Memory, *, experts: bool) -> Layout:
    """Step 3: the last device takes what it can, then the one before it; of models with experts the other weights alone."""
    last = len(targets) - 1
    layout: Layout = tuple(DevicePart() for _ in targets)
    for device in range(last, -1, -1):
        full = 1 if device == last else 0  # the output layer, which is never partial
        before, after = layout[:device], layout[device + 1 :]

        def filled(count: int, full: int = full, before: Layout = before, after: Layout = after) -> Layout:
            return (*before, _part(count, full, experts=experts), *after)

        layout = _most(filled, total - sum(part.layers for part in layout), device, targets, memory)
    return layout


def _part(count: int, full: int, *, experts: bool) -> DevicePart:
    """What a device holds of ``count`` layers in step 3: of layers with experts, all but ``full`` are there without them."""
    return DevicePart(count, max(count - full, 0) if experts else 0)


def _front_to_back(layout: Layout, targets: Sequence[float], memory: Memory) -> Layout:
    """Step 4: experts come back, to the first device first, then a part of one more layer where it fits."""
    last = len(targets) - 1
    start = len(targets)  # the first device of those, to the last, that hold layers without experts
    while start and layout[start - 1].layers:
        start -= 1
    for device in range(len(targets)):
        if device > start or start > last:
            break
        convertible = sum(part.partial for part in layout[start:])
        layout = _most(partial(_converted, layout, device, start), convertible, device, targets, memory)
        start = next((one for one in range(start, last) if layout[one].partial), last)
        if layout[start].layers > (device == last):
            more = _part_of_one_more(layout, device, start, targets, memory)
            start += start != device and layout[start].partial == 1 and more != layout
            layout = more
    return layout


def _converted(layout: Layout, device: int, start: int, count: int) -> Layout:
    """``count`` layers without experts, of the devices from ``start`` on, become whole layers of ``device``."""
    parts = list(layout)
    for donor in range(start, len(parts)):
        moved = min(count, parts[donor].partial)
        parts[donor] = DevicePart(parts[donor].layers - moved, parts[donor].partial - moved)
        parts[device] = parts[device]._replace(layers=parts[device].layers + moved)
        count -= moved
    return tuple(parts)


def _part_of_one_more(layout: Layout, device: int, donor: int, targets: Sequence[float], memory: Memory) -> Layout:
    """The largest fraction of one more layer for which the device and the next one stay strictly below their targets.

    Where the donor has no layer without experts left, that layer is the output, which moves whole.
    """

    def extended(fraction: Fraction) -> Layout | None:
        parts = list(layout)
        parts[donor] = DevicePart(parts[donor].layers - 1, max(parts[donor].partial - 1, 0))
        parts[device] = DevicePart(parts[device].layers + 1, parts[device].partial + 1, fraction)
        held = memory(tuple(parts))
        reached = range(device, min(device + 2, len(parts)))
        return tuple(parts) if all(held[one] < targets[one] for one in reached) else None

    if donor == device and not layout[device].partial:
        return layout
    with_up = extended("up")
    if with_up is not None:
        return extended("gate") or with_up
    return extended("attention") or layout


def _most(candidate: Callable[[int], Layout], high: int, device: int, targets: Sequence[float], memory: Memory) -> Layout:
    """The last of the candidates 0 to ``high`` that fits on ``device``, found as the engine finds it: by false position.

    Where memory does not grow evenly, the first guesses decide.
    """
    low, target = 0, targets[device]
    most = memory(candidate(high))[device]
    if most <= target:
        return candidate(high)
    least = memory(candidate(low))[device]
    while high - low > 1:
        room = most - least
        step = int((high - low) * (target - least) / room) if room > 0 and target >= least else high - low - 1
        guess = low + min(max(step, 1), high - low - 1)
        held = memory(candidate(guess))[device]
        if held <= target:
            low, least = guess, held
        else:
            high, most = guess, held
    return candidate(low)


def steps(total: int, memory: Memory, *, experts: bool) -> Iterator[tuple[float, Layout | None]]:
    """All that :func:`refit` ends with on one device: the target from which on it does, whole bytes ascending, and the layout.

    ``None``: up to the next step it depends on which candidates are tried first, so it has to be asked.
    """

    def filled(count: int) -> Layout:
        return (_part(count, 1, experts=experts),)

    back = floor(memory((DevicePart(total, total),))[0]) + 1 if experts else inf  # from there on step 4 is taken
    for low, high, count in _ends(filled, total, memory):
        if count is None:
            yield low, None
            continue
        layout = filled(count)
        if low < back or not count:
            yield low, layout
        if high <= back or not count:
            continue
        for begin, end, whole in _ends(partial(_converted, layout, 0, 0), layout[0].partial, memory):
            first, end = max(begin, low, back), min(end, high)
            if first < end and whole is None:
                yield first, None
            elif first < end and whole is not None:
                base = _converted(layout, 0, 0, whole)
                extended = [(base[0]._replace(fraction=one),) for one in ("attention", "up", "gate") if base[0].partial]
                edges = {first, *(floor(memory(one)[0]) + 1 for one in extended)}
                for edge in sorted(one for one in edges if first <= one < end):
                    yield edge, _part_of_one_more(base, 0, 0, (edge,), memory)


def _ends(candidate: Callable[[int], Layout], high: int, memory: Memory) -> Iterator[tuple[float, float, int | None]]:
    """What :func:`_most` finds on one device: from one target on, up to before another, the number that it ends with.

    It ends with a candidate that fits before one that does not. Where those that fit are the first ones, there is one such
    place, whatever is tried; elsewhere the number is ``None``.
    """
    *sizes, top = [ceil(memory(candidate(count))[0]) for count in range(high + 1)]
    start, furthest = -inf, -1
    found: int | None = 0
    for fitting, index in enumerate(sorted((one for one in range(high) if sizes[one] < top), key=sizes.__getitem__), 1):
        if sizes[index] > start:
            yield start, sizes[index], found
        start, furthest = sizes[index], max(furthest, index)
        found = furthest if furthest + 1 == fitting else None
    yield start, top, found
    yield top, inf, high
