"""What starts of vLLM say of the blocks of its KV cache: how many, of which size, and how many a sequence takes.

Blocks are whole: two starts at different lengths and sizes give their cost exactly. Where a log names none, tokens and
concurrency still say what a sequence of the full length takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from harness.engines.vllm.releases import TOKENS_BY_CONCURRENCY
from harness.errors import UntrustedError
from harness.model.calibration import KvBlocks
from harness.model.facts import VllmFacts
from harness.model.record import Load
from harness.text import at_least, release
from harness.units import GIB

#: A figure with two decimals of GiB may be off by this.
ROUNDING: Final = GIB // 200
#: A block is a whole number of these: no tensor of a KV cache is smaller.
_GRAIN: Final = 512
#: Tokens of a block where no log names them, largest first (vllm/config, ``BlockSize``).
_BLOCK_SIZES: Final = (256, 128, 64, 32, 16)
#: By so much more a line may say that the full length takes: for the rounding of two logs, and with whole blocks.
_ROUNDED: Final = 0.02
LINE_ABOVE: Final = 0.1


class VllmStart(msgspec.Struct, frozen=True):
    """One start that became ready."""

    load: Load
    facts: VllmFacts

    @property
    def context(self) -> int:
        """The length that it was checked for."""
        said = self.load.reported
        return (said and said.context) or self.facts.max_model_len or self.load.request.context

    @property
    def block_size(self) -> int | None:
        """Tokens of a block."""
        said = self.load.reported
        return (said and said.block_size) or self.facts.block_size or self._dense_size

    @property
    def _counts_tokens(self) -> bool:
        """Whether the log's tokens are those of its blocks; a build between releases may count as the next one does."""
        version = self.facts.version
        built = any(word in (version or "") for word in ("dev", "rc")) and at_least(version, (0, 19, 0))
        return release(version) is not None and not at_least(version, TOKENS_BY_CONCURRENCY) and not built

    @property
    def _dense_size(self) -> int | None:
        """The most tokens that a block can have, where tokens and concurrency show that every layer keeps every token."""
        tokens, times = self.facts.kv_tokens, self.facts.max_concurrency
        if not self._counts_tokens or self.facts.num_gpu_blocks is not None or not tokens or times is None:
            return None
        whole = (size for size in _BLOCK_SIZES if tokens % size == 0)
        return next((size for size in whole if abs(tokens / (-(-self.context // size) * size) - times) <= 0.00501), None)

    @property
    def available(self) -> int | None:
        """What the KV cache got on each GPU, bytes; the log rounds it to :data:`ROUNDING` where it was not asked for."""
        given = self.load.request.kv_cache_bytes
        sizes = [worker.kv_available_bytes for worker in self.facts.workers if worker.kv_available_bytes is not None]
        return given if given is not None else min(sizes, default=None)

    @property
    def most_of_sequence(self) -> int | None:
        """What one sequence of the full length takes on each GPU at most, bytes: the cache over the concurrency."""
        tokens, times, cache = self.facts.kv_tokens, self.facts.max_concurrency, self.available
        if not tokens or not times or cache is None:
            return None
        exact = at_least(self.facts.version, TOKENS_BY_CONCURRENCY)
        least = tokens / self.context if exact else times - 0.005
        slack = 0 if self.load.request.kv_cache_bytes is not None else ROUNDING
        return math.ceil((cache + slack) / least) if least > 0 else None

    @property
    def least_of_sequence(self) -> int | None:
        """What it takes at least: the cache, less a block that may be begun, over the most that the concurrency can be."""
        tokens, times, cache, most = self.facts.kv_tokens, self.facts.max_concurrency, self.available, self.most_of_sequence
        if not tokens or not times or cache is None or most is None:
            return None
        exact = at_least(self.facts.version, TOKENS_BY_CONCURRENCY)
        slack = 0 if self.load.request.kv_cache_bytes is not None else ROUNDING
        block = -(-most // _parts(self))
        return math.floor((cache - slack - block) / ((tokens + 1) / self.context if exact else times + 0.005))

    @property
    def number(self) -> int | None:
        """Blocks, from the running engine or from its log."""
        said = self.load.reported
        number = (said and said.num_blocks) or self.facts.num_gpu_blocks
        tokens, size = self.facts.kv_tokens, self.block_size
        if number is None and self._counts_tokens and tokens and size and tokens % size == 0:
            return tokens // size
        return number

    @property
    def of_sequence(self) -> int | None:
        """Blocks of one sequence of the full length: blocks over concurrency, which the log rounds to two decimals."""
        said = self.load.reported
        exact = said.max_concurrency if said else None
        times, off = (exact, 0.0001) if exact else (self.facts.max_concurrency, 0.005)
        if self.number is None or not times or times <= off:
            return None
        dense = None if self.block_size is None else -(-self.context // self.block_size)
        low, high = self.number / (times + off), self.number / (times - off)
        if dense is not None and low <= dense <= high:
            return dense
        nearest = round(self.number / times)
        return nearest if low <= nearest <= high and high - low < 1 else None


def block_interval(start: VllmStart) -> tuple[float, float] | None:
    """The bytes of a block lie above the first and at most at the second: the engine rounds down to whole blocks."""
    number, given = start.number, start.load.request.kv_cache_bytes
    if not number:
        return None
    if given is not None:
        return given / (number + 1), given / number
    available = [worker.kv_available_bytes for worker in start.facts.workers if worker.kv_available_bytes is not None]
    if not available:
        return None
    return (min(available) - ROUNDING) / (number + 1), (min(available) + ROUNDING) / number


def block_bytes(starts: Sequence[VllmStart]) -> int:
    """The bytes of a block: of all that the starts allow, the roundest number in binary, as products of sizes are.

    Raises:
        UntrustedError: the starts contradict each other, or say nothing.
    """
    intervals = [interval for start in starts if (interval := block_interval(start)) is not None]
    if not intervals:
        raise UntrustedError("neither the engine nor its log names the blocks of the KV cache", code="no-blocks")
    low, high = int(max(one[0] for one in intervals)), int(min(one[1] for one in intervals))
    if low >= high:
        raise UntrustedError("the starts contradict each other about the size of a block", code="blocks-disagree")
    grain = 1 << high.bit_length()
    while grain > _GRAIN and high // grain * grain <= low:
        grain >>= 1
    exact = high // grain * grain
    return exact if exact > low else high  # without a round number the largest that is possible is safe


def fit_blocks(starts: Sequence[VllmStart], *, whole: bool = False) -> KvBlocks:
    """Blocks by sequence and length.

    Args:
        starts: that became ready.
        whole: where the starts do not say how a sequence grows, take that of the full length as a bound of shorter ones.

    Raises:
        UntrustedError: the lengths do not lie on a line of whole blocks, or are too few for a hybrid model.
    """
    size = starts[0].block_size
    if whole and (size is None or all(start.number is None for start in starts)):
        return _whole_sequences(starts)
    if size is None or any(start.block_size != size for start in starts):
        raise UntrustedError("the block size is not known, or differs between starts", code="no-blocks")
    cost = block_bytes(starts)
    needs = sorted({(-(-start.context // size), need) for start in starts if (need := start.of_sequence) is not None})
    if not needs and whole:
        return _whole_sequences(starts)
    if not needs:
        raise UntrustedError("the concurrency that would tell blocks per sequence was not said", code="no-blocks")
    if all(blocks == need for blocks, need in needs):
        return KvBlocks(size=size, bytes=cost)
    (first, low), (last, high) = needs[0], needs[-1]
    if first == last and whole:
        return _whole_sequences(starts)
    if first == last:
        raise UntrustedError("a hybrid model needs two different lengths", hint="--ctx 8192,32768", code="too-few-points")
    per_block = (high - low) / (last - first)
    fixed = low - per_block * first
    if per_block != int(per_block) or per_block < 1 or fixed < 0:
        raise UntrustedError("the blocks of a sequence are not a straight line over its length", code="not-a-line")
    return KvBlocks(size=size, bytes=cost, per_block=int(per_block), fixed=int(fixed))


def _parts(start: VllmStart) -> int:
    """Blocks that a sequence of the full length has at least: one for every 256 tokens, or of the size that the log names."""
    return max(-(-start.context // (start.block_size or _BLOCK_SIZES[0])), 2)


def _whole_sequences(starts: Sequence[VllmStart]) -> KvBlocks:
    """A cache that is known by sequences of the full length alone: a shorter one takes at most as much.

    Its parts are no smaller than a block of the engine, which takes one more than its sequences need. Another length shows
    whether both take their share.
    """
    start, shorter = max(starts, key=lambda one: one.context), min(starts, key=lambda one: one.context)
    most, tokens = start.most_of_sequence, start.facts.kv_tokens
    if most is None or tokens is None:
        raise UntrustedError("the concurrency that would tell blocks per sequence was not said", code="no-blocks")
    if start.block_size is None and tokens > start.context and tokens % start.context == 0:
        raise UntrustedError(
            f"the KV cache holds exactly {tokens // start.context} sequences, as one of states does, whose blocks the log does "
            "not name",
            code="no-blocks",
        )
    if (line := _line_above(shorter, start)) is not None:
        return line
    parts = _parts(start)
    return KvBlocks(size=start.context, bytes=-(-most // parts), fixed=parts - 1)


def _line_above(short: VllmStart, long: VllmStart) -> KvBlocks | None:
    """A straight line above what every length up to ``long`` takes, where it is what ``long`` takes there; else ``None``.

    What a sequence takes is concave in its length, and not below zero without tokens: layers keep every token, or those of a
    window, or a state (vllm/v1/kv_cache_interface.py, ``max_memory_usage_bytes``). So two lengths give no exact growth: between
    them a window may end, and their chord says too little. Below ``short`` the chord continued is above it; from there on the
    share that ``short`` takes is, and what ``long`` takes. One line is above all three. Where every layer keeps every token
    they meet but for the log's rounding; with windows or states the line is far above ``long`` at its own length.
    """
    below, above, most = short.most_of_sequence, long.least_of_sequence, long.most_of_sequence
    if below is None or above is None or most is None or short.context == long.context:
        return None
    step = max(_BLOCK_SIZES[0], short.block_size or 0, long.block_size or 0)
    whole = -(-long.context // step) * step  # it takes whole blocks, which are no larger
    slope = min((above - below) / (whole - short.context), below / short.context)
    if slope <= 0:
        return None
    fixed = max(most - slope * short.context * most / below, 0.0)
    if fixed + slope * long.context > (1 + _ROUNDED) * most:
        return None
    cost = math.ceil(slope * step)
    line = KvBlocks(size=step, bytes=cost, fixed=math.ceil(fixed / cost), bound=True)
    return line if line.of_sequence(long.context) * cost <= (1 + LINE_ABOVE) * most else None


def left_out(starts: Sequence[VllmStart]) -> float | None:
    """The worst relative error of a start's blocks as the others predict them, beyond what the log's rounding allows."""
    errors = []
    for left in starts:
        others = [start for start in starts if start is not left and block_interval(start) is not None]
        interval = block_interval(left)
        if left.number is None or interval is None or not others:
            continue
        cost = block_bytes(others)
        low, high = (int(edge * number / cost) for edge, number in zip(interval, (left.number + 1, left.number), strict=True))
        errors.append(max(low - left.number, left.number - high, 0) / left.number)
    return max(errors) if errors else None
