"""Logs that no engine wrote: pieces of real ones, glued, cut, swapped and broken; any exception ends the run.

python -m bench.log_fuzz [--count 1000000] [--seed 1]

Each input is read whole, and one in 64 again in small pieces, which must not change what is found. At the end every piece is
repeated into the longest line that is looked at, which may not cost much more than four times a quarter of it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from harness.logs import parse_chunks, parse_log
from harness.logs.text import MAX_LINE

GOLDEN: Final = Path(__file__).parents[1] / "tests" / "golden"
JUNK: Final = (
    b"\x00", b"\xff\xfe", b"\r", b"\r\n", b"\x1b[31m", b"....", b'"', b"\\", b"'", b"(", b"[", b"|", b" = ", b": ", b"  ",
    b"9" * 40, b"-1", b"\xc2\xb2", b"1e999", b"nan", b" MiB", b" cells", b'{"log":"', b"msg=", b"level=INFO ", b"\n\n",
)  # fmt: skip


def lines() -> list[bytes]:
    """The different lines of all golden logs, with their ends."""
    found: dict[bytes, None] = {}
    for path in sorted(GOLDEN.rglob("*.log")):
        found.update(dict.fromkeys(path.read_bytes().splitlines(keepends=True)))
    return list(found)


def mutated(chance: random.Random, pieces: Sequence[bytes]) -> bytes:
    """One input: a few lines, some of them damaged."""
    start = chance.randrange(len(pieces))
    picked = list(pieces[start : start + chance.randint(1, 6)])
    picked += [pieces[chance.randrange(len(pieces))] for _ in range(chance.randint(0, 2))]
    for _ in range(chance.randint(0, 4)):
        at = chance.randrange(len(picked))
        line = picked[at]
        here = chance.randint(0, len(line))
        action = chance.randrange(6)
        if action == 0:
            picked[at] = line[:here]
        elif action == 1:
            picked[at] = line[:here] + chance.choice(JUNK) + line[here:]
        elif action == 2:
            picked[at] = line[:here] + line[chance.randint(here, len(line)) :]
        elif action == 3:
            picked[at] = line * 2
        elif action == 4 and line:
            picked[at] = bytes([*line[: here - 1], chance.randrange(256), *line[here:]])
        else:
            other = chance.randrange(len(picked))
            picked[at], picked[other] = picked[other], line
    return b"".join(picked)


def check(chance: random.Random, data: bytes) -> int:
    """Read one input; returns how many loads were found."""
    found = parse_log(data)
    json.dumps([facts.to_json() for facts in found])
    if chance.randrange(64) == 0:
        size = chance.randint(1, 50)
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        if parse_chunks(pieces) != found:
            raise AssertionError(f"pieces of {size} bytes change what is found")
    return len(found)


def milliseconds(piece: bytes, size: int) -> float:
    """Processor time for one line of ``size`` bytes made of ``piece``; the least of three."""
    line = (piece * (size // len(piece) + 1))[:size] + b"\n"
    found = []
    for _ in range(3):
        begin = time.process_time()
        parse_log(line)
        found.append(time.process_time() - begin)
    return 1000 * min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance, pieces = random.Random(options.seed), lines()  # noqa: S311 - the same inputs at every run
    begin, loads, size = time.perf_counter(), 0, 0
    for number in range(options.count):
        data = mutated(chance, pieces)
        size += len(data)
        try:
            loads += check(chance, data)
        except Exception:
            print(f"input {number} of seed {options.seed}: {data!r}")
            raise
    seconds = time.perf_counter() - begin
    print(f"{options.count} inputs ({size / 1e6:.0f} MB, {loads} loads found) in {seconds:.0f} s: no exception")
    worst, growth = 0.0, 0.0
    kinds = {piece[:20]: piece.replace(b"\r", b"").replace(b"\n", b"") for piece in (*JUNK, *pieces)}
    for piece in filter(None, kinds.values()):
        long = milliseconds(piece, MAX_LINE)
        if long > 2.0:  # shorter times say nothing about growth
            growth = max(growth, long / milliseconds(piece, MAX_LINE // 4))
        worst = max(worst, long)
    print(f"a line of {MAX_LINE >> 10} KiB, the longest looked at: {worst:.1f} ms at most, {growth:.1f} times a quarter of it")


if __name__ == "__main__":
    main()
