"""Compute buffers of each device of a model on several: what decides them, which dry runs tell them, and what follows without.

What llama.cpp's graph allocator holds at once on a device does not follow from the number of its layers, but from where the
device stands in the order, which kinds of layers it has at its ends, what is before and behind them, and whether the
scheduler keeps copies of its inputs. Two devices of which all that is equal hold the same compute, to the byte (llama.cpp
b11434, every split of five models over two ``ggml-rpc-server``: ``bench/devices.py``). So a few dry runs tell all splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from harness.model.calibration import SetCompute
from harness.prediction.layout import DevicePart, Layout, pipelined
from harness.units import from_gib

#: Copies that the scheduler keeps of its inputs (ggml-backend.cpp, ``GGML_SCHED_MAX_COPIES``).
COPIES: Final = 4
#: Layouts over several devices that a calibration asks the engine about, at most; each at every one of a few contexts.
LAYOUTS: Final = 48
_SAMPLES: Final = 3000


class OneDevice(NamedTuple):
    """Compute of a model on one device at a context, bytes, from which that on several follows.

    ``full``: with every layer there; ``growing`` of it is what grows with the context. ``mask`` and ``window_mask`` are those
    of layers that attend to everything and to a window. ``hidden`` is a batch as it passes from layer to layer: 4 bytes times
    width times batch; ``None`` where the width is not known, 0 where copies are counted already.
    """

    full: float
    growing: float
    mask: float
    window_mask: float
    hidden: float | None

    @property
    def constant(self) -> float:
        """What does not grow."""
        return max(self.full - self.growing, 0.0)


#: What a device holds more than the only one does, in batches as they pass between layers: the first device of a pipeline
#: (copies of the embedded tokens and of the input that embeddings would be), the others of it (of what comes from the device
#: before), and those behind the first without copies (whose input is no embedding).
_FIRST, _LATER, _BEHIND = 12.0, 7.0, -2.0
#: What the last device takes in all, but for masks, if it has one layer and the output: behind the attention of the last layer
#: only the tokens are left whose output is asked for. As one of a pipeline, and without copies.
_LAST, _LAST_BEHIND = 11.0, 4.0
#: A short convolution holds three batches at once where attention holds one (src/models/lfm2.cpp, ``in_proj``).
_RECURRENT: Final = 2.0
#: By how much that may be off, in the same unit, and as a share of what does not grow, if that is more.
_OFF, _OFF_SHARE = 4.0, 0.25
#: Where the width is not known, in parts of what does not grow: more than one device holds (b11434: 0.6 to 1.7), and the bound.
_MORE, _MORE_OFF = 0.75, 1.0


def by_law(
    kinds: str,
    layout: Layout,
    one: OneDevice,
    begin: float,
    behind: Callable[[int], float | None] | None = None,
) -> list[tuple[float, float]]:
    """Bytes of each device as they follow from one device, and how far each may be off.

    Args:
        kinds: a letter a layer (``layer_kinds``), without the output.
        layout: over the devices.
        one: what one device takes with everything there.
        begin: what the first device with layers takes where something is on the host, as one device does with as much there.
        behind: what one device takes from a layer on, behind others that hand over a batch alone; of devices that work out
            nothing of what is on the host (remote ones have no ``offload_op``, ggml-rpc.cpp), else ``None``.

    Source: the scheduler keeps :data:`COPIES` of each input of a pipeline, and gives none of them back (ggml-backend.cpp,
    pass 5 of ``ggml_backend_sched_split_graph``): masks, and what passes from one device to the next.
    """
    letters = f"{kinds}o"
    start, piped = len(letters) - sum(part.layers for part in layout), pipelined(layout, len(letters))
    share = _OFF_SHARE if one.hidden else _MORE_OFF
    off = max(_OFF * (one.hidden or 0.0), share * one.constant)
    found, first = [], True
    for index, part in enumerate(layout):
        own, before = letters[start : start + part.layers], start
        start += part.layers
        attends, hidden = any(kind in "fb" for kind in own), one.hidden or 0.0
        # A mask that only the first layer needs is given back before the layers that need most.
        early = one.growing * (not any(kind in "fb" for kind in own[1:]))
        windowed = (COPIES - 1) * one.window_mask * ("w" in own)
        # Remote, and of attention its first layer alone, whose mask is given back before the others need most.
        alone = behind is not None and own and not any(kind in "fbw" for kind in own[1:])
        ends, size, doubt = len(own) == 2 and own[-1] == "o" and not first, 0.0, off
        more_last = _RECURRENT * hidden * (own[:1] == "r")
        if not own or own == "o":
            doubt = off if own else 0.0
        elif piped:
            more = _MORE * one.constant if one.hidden is None else (_FIRST if first else _LATER) * hidden
            size = _LAST * hidden + more_last if ends and hidden else one.constant + more
            size += (one.growing + (COPIES - 1) * one.mask) * attends + windowed
            doubt += windowed
        elif (index == 0 or (first and behind is not None)) and not (alone and letters[before - 1] == "r"):
            size, doubt = begin, off + early
        elif ends and hidden:
            size = _LAST_BEHIND * hidden + more_last + one.growing * attends
            doubt += early * attends
        else:
            least = max(one.constant + _BEHIND * hidden, 0.0)
            known = None if behind is None else behind(before)
            if alone:
                size = max(least, _LAST_BEHIND * hidden + one.growing * attends)
            else:
                size = least + one.growing * attends if known is None else known
            # Where one device begins in the middle of the list, what is on the host is worked out on the first of the list
            # (``offload_op``), or on the host.
            doubt += max(early * attends, begin - size if first else 0.0)
        found.append((size, doubt))
        first = first and not own
    return found


class Spot(NamedTuple):
    """What decides the compute of one device in a layout.

    Letters are kinds of layers (``layer_kinds``), ``o`` is the output. ``first`` is its first layer, ``before`` the last one on
    the host (of the first device alone; of the others ``-`` where the one before leaves its experts to the host), ``behind``
    the first one of the next device. ``attends``: a layer beyond its first attends to everything. ``size``: one, two or more
    layers, beside the output. ``experts``: whether it has layers with experts and layers without.
    """

    pipelined: bool
    place: str
    size: int
    before: str
    first: str
    behind: str
    attends: bool
    experts: str


def spots(kinds: str, layout: Layout, *, moe: bool) -> list[Spot | None]:
    """The spot of each device; ``None`` for one without layers. ``kinds`` has a letter a layer, without the output."""
    letters = f"{kinds}o"
    used = [index for index, part in enumerate(layout) if part.layers]
    start = len(letters) - sum(part.layers for part in layout)
    host, piped = letters[:start], pipelined(layout, len(letters))
    found: list[Spot | None] = []
    previous = DevicePart()
    for index, part in enumerate(layout):
        own = letters[start : start + part.layers]
        start += part.layers
        if not own:
            found.append(None)
            continue
        first, last = index == used[0], index == used[-1]
        found.append(
            Spot(
                pipelined=piped,
                place=f"{'first' * first}{'last' * last}",
                size=min(len(own), 4 if last else 3),
                before=host[-1:] if first else "-" * bool(previous.partial),
                first=own[0],
                behind="" if last else letters[start],
                attends=any(one in "fb" for one in own[1:]),
                experts=f"{'with' * (part.full > last)}{'out' * bool(part.partial)}" if moe else "",
            )
        )
        previous = part
    return found


class DeviceCompute:
    """Compute of each device at one context, from dry runs; a spot that none of them had is taken for the most like it."""

    def __init__(self, rows: Sequence[SetCompute], kinds: str, context: int, *, moe: bool) -> None:
        self.kinds, self.moe = kinds, moe
        self._known: list[dict[Spot, tuple[float, float]]] = [{} for _ in range(_LEVELS)]
        for row in rows:
            layout = tuple(DevicePart(*one) for one in zip(row.layers, row.partial or (0,) * len(row.layers), strict=True))
            sizes = [_at(context, row.contexts, [compute[index] for compute in row.compute_gb]) for index in range(len(layout))]
            for spot, size in zip(spots(kinds, layout, moe=moe), sizes, strict=True):
                if spot is not None:
                    for level, known in enumerate(self._known):
                        low, high = known.get(_like(spot, level), size)
                        known[_like(spot, level)] = min(low, size[0]), max(high, size[1])

    def of(self, layout: Layout) -> list[tuple[float, float]] | None:
        """Bytes of each device, and how far each may be off; ``None`` where no dry run was like it."""
        if not self._known[0] and any(part.layers for part in layout):
            return None
        found = []
        for spot in spots(self.kinds, layout, moe=self.moe):
            if spot is None:
                found.append((0.0, 0.0))
                continue
            likes = (self._known[level].get(_like(spot, level)) for level in range(_LEVELS))
            level, known = next(((level, one) for level, one in enumerate(likes) if one is not None), (0, None))
            if known is None:
                return None
            low, high = known
            found.append((low, high - low) if level == 0 else (high, max(high - low, _ALIKE * high)))
        return found

    def has(self, layout: Layout) -> bool:
        """Whether every device of a layout was in a dry run as it is here."""
        return all(spot is None or spot in self._known[0] for spot in spots(self.kinds, layout, moe=self.moe))


#: By how much a spot that is only like another one may hold less or more, at least.
_ALIKE: Final = 1 / 8
#: How alike two spots are: the same; but for numbers; but for kinds; in their place alone.
_LEVELS: Final = 4


def _like(spot: Spot, level: int) -> Spot:
    if level >= 1:
        spot = spot._replace(size=0, behind="")
    if level >= 2:
        spot = spot._replace(first=spot.first if spot.first == "o" else "", before="")  # the output alone takes next to nothing
    if level >= 3:
        spot = spot._replace(attends=False, experts="")
    return spot


def _at(context: int, contexts: Sequence[int], sizes: Sequence[float]) -> tuple[float, float]:
    """Bytes at a context between dry runs, at least and at most.

    A buffer is the largest of some graphs, each of which grows by a straight line: it bends upwards alone, so it is never above
    the line between its neighbours, nor below the lines through those on either side. Below the smallest context it is that
    one's.
    """
    points = [(at, float(from_gib(size))) for at, size in sorted(zip(contexts, sizes, strict=True))]
    if context <= points[0][0] or len(points) == 1:
        return points[0][1], points[0][1]
    right = next((index for index in range(1, len(points)) if context <= points[index][0]), len(points) - 1)
    most = _line(points[right - 1], points[right], context)
    beside = [points[right - 2 : right]] * (right > 1) + [points[right + 1 : right - 1 : -1]] * (right + 1 < len(points))
    least = min(max((_line(pair[0], pair[1], context) for pair in beside), default=most), most)
    return (least if right + 1 < len(points) else most), most


def _line(one: tuple[int, float], other: tuple[int, float], at: int) -> float:
    return one[1] + (other[1] - one[1]) * (at - one[0]) / (other[0] - one[0])


def plan_sets(kinds: str, devices: int, *, moe: bool) -> tuple[Layout, ...]:
    """Layouts over several devices whose dry runs tell the most: :data:`LAYOUTS` at most, the most telling first."""
    sampled = [(layout, set(filter(None, spots(kinds, layout, moe=moe)))) for layout in _sample(kinds, devices, moe=moe)]
    weights = Counter(spot for _, some in sampled for spot in some)
    chosen: list[Layout] = []
    while len(chosen) < LAYOUTS and weights:
        layout, some = max(sampled, key=lambda one: sum(weights[spot] for spot in one[1]))
        chosen.append(layout)
        for spot in some:
            del weights[spot]
    return tuple(chosen)


def _sample(kinds: str, devices: int, *, moe: bool) -> Iterator[Layout]:
    """Layouts that the engine comes by: all layers on devices, or the last ones; experts as its second pass leaves them."""
    total = len(kinds) + 1
    state = 1

    def upto(most: int) -> int:
        """A number from 0 to ``most``: evenly spread, and the same every time (Park and Miller's generator)."""
        nonlocal state
        state = state * 48_271 % 0x7FFF_FFFF
        return state % (most + 1)

    for _ in range(_SAMPLES):
        kind = upto(7)
        count = total if kind < 4 else 1 + upto(total - 2)
        cuts = sorted(upto(count) for _ in range(devices - 1)) if kind != 3 else [0] * (devices - 1)
        layers = [end - begin for begin, end in zip([0, *cuts], [*cuts, count], strict=True)]
        without = [0] * devices
        if moe and kind:
            output = max(index for index, one in enumerate(layers) if one)
            most = [one - (index == output) for index, one in enumerate(layers)]
            begun = upto(sum(most)) if 0 < kind < 3 else 0  # layers with experts come first
            for index, one in enumerate(most):
                without[index] = one - min(begun, one)
                begun -= min(begun, one)
        yield tuple(map(DevicePart, layers, without))
