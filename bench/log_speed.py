"""How fast logs are read, and in how much memory.

python -m bench.log_speed [--megabytes 1024]

Each case is read in a process of its own, in blocks of 1 MiB. "of one core" divides by the processor's time, so that other
work on the machine does not count; peak memory is the process's own (VmHWM), beside that of one that reads an empty log.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

BLOCK: Final = 1 << 20
GOLDEN: Final = Path(__file__).parents[1] / "tests" / "golden"
#: One conversation as llama-server prints it at -lv 4, with gin's access log of Ollama.
SERVED: Final = """\
slot get_availabl: id  0 | task -1 | selected slot by LCP similarity, sim_best = 0.913 (> 0.100 thold), f_keep = 1.000
slot launch_slot_: id  0 | task {n} | processing task, is_child = 0
slot update_slots: id  0 | task {n} | new prompt, n_ctx_slot = 8192, n_keep = 4, task.n_tokens = 1{n}
slot update_slots: id  0 | task {n} | n_tokens = 512, memory_seq_rm [512, end)
slot update_slots: id  0 | task {n} | prompt processing progress, n_tokens = 1024, batch.n_tokens = 512, progress = 0.411
slot update_slots: id  0 | task {n} | prompt done, n_tokens = 1{n}, batch.n_tokens = 11
slot create_check: id  0 | task {n} | created context checkpoint 1 of 8 (pos_min = 0, pos_max = 200, size = 18.759 MiB)
slot print_timing: id  0 | task {n} |
prompt eval time =     579.12 ms /    26 tokens (   22.27 ms per token,    44.90 tokens per second)
       eval time =    7551.42 ms /   271 tokens (   27.87 ms per token,    35.89 tokens per second)
      total time =    8130.54 ms /   297 tokens
slot      release: id  0 | task {n} | stop processing: n_tokens = 1{n}, truncated = 0
srv  update_slots: all slots are idle
srv        update:  - cache state: 1 prompts, 6.564 MiB (limits: 8192.000 MiB, 4096 tokens, 5120 est)
srv  log_server_r: done request: POST /v1/chat/completions 127.0.0.1 200
[GIN] 2026/09/02 - 16:01:23 | 200 |  5.71619152s |       127.0.0.1 | POST     "/api/chat"
"""


def loads() -> bytes:
    """Every golden log of llama.cpp and Ollama once: loads, and nothing else."""
    return b"".join(
        path.read_bytes() for engine in ("llama-server", "ollama") for path in sorted((GOLDEN / engine).rglob("*.log"))
    )


def served(wrap: Callable[[str], str] = lambda line: f"{line}\n") -> bytes:
    """A thousand requests, then a load."""
    text = "".join(SERVED.format(n=number) for number in range(1000))
    one = sorted((GOLDEN / "llama-server").rglob("*.log"))[0].read_text()
    return "".join(wrap(line) for line in (text + one).splitlines()).encode()


def repeated(data: bytes, size: int) -> Iterator[bytes]:
    """``data`` again and again, in blocks."""
    buffer = data * (BLOCK // len(data) + 2)
    for at in range(0, size, BLOCK):
        start = at % len(data)
        yield buffer[start : start + BLOCK]


CASES: Final[dict[str, tuple[str, Callable[[int], Iterator[bytes]], float]]] = {
    "empty": ("nothing", lambda _: iter(()), 0),
    "served": ("a served log, a load every 1,000 requests", lambda size: repeated(served(), size), 1),
    "journald": (
        "the same through journald",
        lambda size: repeated(served(lambda line: f"Aug 27 23:56:51 host ollama[1502]: {line}\n"), size),
        0.25,
    ),
    "loads": ("loads and nothing else (the golden logs)", lambda size: repeated(loads(), size), 0.05),
    "line": ("one line", lambda size: repeated(b"llama_kv_cache:      CUDA0 KV buffer size =    24.00 MiB ", size), 0.05),
}


def run(case: str, size: int) -> dict[str, float]:
    """Read one case in this process."""
    from harness.logs import parse_chunks

    blocks = CASES[case][1](size)
    wall, processor = time.perf_counter(), time.process_time()
    found = parse_chunks(blocks)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall": wall, "processor": processor, "peak": peak, "loads": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the served log; the others are parts of it")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case, int(options.megabytes * 1e6 * CASES[options.case][2]))))
        return
    base = 0.0
    for case, (title, _, share) in CASES.items():
        command = [sys.executable, "-m", "bench.log_speed", "--case", case, "--megabytes", str(options.megabytes)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if case == "empty":
            base = result["peak"]
            continue
        size = options.megabytes * share
        print(
            f"{title}: {size:.0f} MB, {result['loads']:.0f} loads: {size / result['processor']:.1f} MB/s of one core "
            f"({size / result['wall']:.1f} MB/s of wall time), peak memory +{(result['peak'] - base) / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
