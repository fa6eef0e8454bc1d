"""Compute buffers between contexts of which an engine has planned them: straight, or off that line by so much at most.

llama.cpp packs the buffers of a graph anew at each context (``ggml_gallocr``, ggml/src/ggml-alloc.c). What grows is hidden
below the activations of a batch up to some context, and just beyond one at which a buffer filled a gap exactly, often a power
of two, they step up. So they do with the f16 copies of a layer's f32 keys and values that flash attention reads
(``llm_graph_context::build_attn_mha``, src/llama-graph.cpp), and with the scores of a layer without flash attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec

from harness.fit.lines import ROUNDING, Line
from harness.units import CELL_PADDING, MIB

#: Compute between two contexts may be off by this much at least, bytes (seen: 0.08 MiB of 1.7 GiB).
LEAST_DOUBT: Final = 0.1 * MIB
#: Of a line with nothing in between, this part of its rise.
_UNSEEN: Final = 4
#: Where to look for a step: those are often half-way between two contexts that are.
_BESIDE_MIDDLE: Final = 0.4

#: A context in tokens per slot, and bytes of compute buffers.
Knot = tuple[int, float]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A line up to the context ``end``, from the end of the piece before; off by ``doubt`` bytes at most."""

    end: int
    line: Line
    doubt: float


def pieces(knots: Sequence[Knot]) -> tuple[Piece, ...]:
    """The pieces through at least two knots, ascending; what is on one line is one piece, and a step of cells alone is flat."""
    spans = list(pairwise(sorted(knots)))
    found: list[Piece] = []
    for line in _lines(spans):
        (a, low), (b, high) = line[0][0], line[-1][1]
        slope = (high - low) / (b - a) if b - a > CELL_PADDING else 0.0
        doubt = max(LEAST_DOUBT, *(_doubt(spans, span) for span in line))
        if not slope and not found:
            doubt = max(doubt, abs(high - low))
        elif slope and len(line) == 1:  # two are always on a line
            doubt = max(doubt, abs(high - low) / _UNSEEN)
        found.append(Piece(end=b, line=Line(start=high - slope * b, slope=slope), doubt=doubt))
    return tuple(found)


def first_contexts(least: int, most: int) -> list[int]:
    """The contexts that are planned first: powers of two, one step of cells beyond them, and half-way between them."""
    powers = [CELL_PADDING << power for power in range(most.bit_length())]
    found = {least, most, *powers, *(one + CELL_PADDING for one in powers), *(3 * one // 2 for one in powers[1:])}
    return sorted(one for one in found if least <= one <= most)


def missing(knots: Sequence[Knot]) -> list[int]:
    """The contexts that tell more: where the lines of both neighbours meet, if that is in between, else beside the middle.

    A line is asked about until it has three knots and is in no doubt.
    """
    spans = list(pairwise(sorted(knots)))
    found = []
    for line in _lines(spans):
        for span in line:
            if not _is_wide(span) or (len(line) > 1 and _doubt(spans, span) <= LEAST_DOUBT):
                continue
            ((a, low), (b, high)), (before, after) = span, _beside(spans, span)
            at = a + _BESIDE_MIDDLE * (b - a)
            if before is not None and after is not None and before != after and _doubt(spans, span) > LEAST_DOUBT:
                meet = (low - before * a - high + after * b) / (after - before)
                at = meet if a < meet < b else at
            step = min(max(round(at / CELL_PADDING), a // CELL_PADDING + 1), -(-b // CELL_PADDING) - 1)
            found.append(step * CELL_PADDING)
    return found


_Span = tuple[Knot, Knot]


def _lines(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Neighbours that are on one line, together."""
    found: list[list[_Span]] = []
    for span in spans:
        if found and _is_line([*found[-1], span]):
            found[-1].append(span)
        else:
            found.append([span])
    return found


def _is_line(spans: Sequence[_Span]) -> bool:
    (a, low), slope = spans[0][0], _slope((spans[0][0], spans[-1][1]))
    return all(abs(low + slope * (x - a) - y) <= ROUNDING for _, (x, y) in spans)


def _slope(span: _Span) -> float:
    (a, low), (b, high) = span
    return (high - low) / (b - a)


def _is_wide(span: _Span) -> bool:
    """Whether there are contexts between the two."""
    return span[1][0] - span[0][0] > CELL_PADDING


def _beside(spans: Sequence[_Span], own: _Span) -> tuple[float | None, float | None]:
    """The slopes of the nearest lines before and after one; a step of cells is none."""
    before = (_slope(span) for span in reversed(spans) if span < own and _is_wide(span))
    after = (_slope(span) for span in spans if span > own and _is_wide(span))
    return next(before, None), next(after, None)


def _doubt(spans: Sequence[_Span], span: _Span) -> float:
    """How far compute may be off the line: to where those of its neighbours meet, or half of it at a neighbour's slope."""
    own, known = _slope(span), [slope for slope in _beside(spans, span) if slope is not None]
    if not known or not _is_wide(span):
        return 0.0
    left = own - known[0]
    right = known[-1] - own if len(known) > 1 else left
    off = left * right / (left + right) if left * right > 0 else max(abs(left), abs(right)) / 2 if left * right else 0.0
    return abs(off) * (span[1][0] - span[0][0])
