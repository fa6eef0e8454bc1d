"""Files that nobody wrote: damaged headers, calibrations, records, plans, catalogs, configurations and logs with totals.

python -m bench.input_fuzz [--count 100000] [--seed 1] [gguf|artifact|record|plan|catalog|toml|import]...

Whatever a file holds, reading it and asking what follows from it ends with an answer or with an error of harness's own: any
other exception ends the run, as do more than two seconds of processor time for one input or more than two GiB in all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import resource
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.log_fuzz import GOLDEN, lines, mutated
from harness.engines import gguf
from harness.engines.registry import policy_of
from harness.errors import HarnessError
from harness.fit.constants import fit_record
from harness.logs import parse_log
from harness.maintain.import_log import ImportOptions, import_log
from harness.maintain.refit import refit
from harness.prediction.drift import compare
from harness.prediction.memory import predict
from harness.prediction.verdict import judge
from harness.render.drift_markdown import escape
from harness.store.catalog import read_catalog
from harness.store.config import read_file
from harness.store.store import Store
from harness.store.trust import refusals
from harness.store.yaml import parse_calibration, to_yaml
from harness.sweep.run import load_plan
from tests.support.gguf_file import write_gguf
from tests.support.records import load, record

#: Bytes that all of it may take, and seconds of one input.
MEMORY: Final = 2 << 30
SECONDS: Final = 2
#: Where files take no time, if there is such a place.
MEMORY_DISK: Final = "/dev/shm"  # noqa: S108 - a folder of its own is made there
#: Values that no field expects.
ODD: Final[tuple[Any, ...]] = (
    0, -1, 1, 2, 7, 1 << 31, (1 << 63) - 1, 1 << 64, 10**30, 0.0, -0.5, 1e-300, 1e300, True, None, "", "0", "x", "a\nb", "\x00",
    "../../x", [], [1], [[]], {}, {"a": 1}, "9" * 5000, "\u202e", "%s", "2026-01-01", "on", "~", "sha256:0",
)  # fmt: skip
WORDS: Final = (
    b"{", b"}", b"[", b"]", b": ", b"- ", b"\n", b"&a ", b"*a", b"!!python/name:os.system", b"!!binary ", b"'", b'"', b"\x00",
    b"\xff", b"2026-01-01", b"1e999", b".nan", b".inf", b"0x" + b"f" * 40, b"9" * 60, b"~", b"|", b">", b"%YAML 9", b"---",
)  # fmt: skip

Target = Callable[[random.Random, Path], None]


def broken(chance: random.Random, data: bytes) -> bytes:
    """Text with a few pieces cut, doubled, swapped or put in."""
    for _ in range(chance.randint(1, 4)):
        here, there = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
        there = min(there, here + 200)
        action = chance.randrange(5)
        if action == 0:
            data = data[:here] + data[there:]
        elif action == 1:
            data = data[:here] + chance.choice(WORDS) + data[here:]
        elif action == 2:
            data = data[:there] + data[here:]
        elif action == 3 and data:
            data = data[:here] + bytes([chance.randrange(256)]) + data[here + 1 :]
        else:
            found = list(re.finditer(rb"-?\d+(?:\.\d+)?", data))
            if found:
                one = chance.choice(found)
                data = data[: one.start()] + str(chance.choice(ODD)).encode("utf-8", "replace") + data[one.end() :]
    return data


def bent(chance: random.Random, value: Any) -> Any:
    """A document with a few of its values replaced by odd ones."""
    document = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 3)):
        node, key = document, None
        holder: Any = None
        while isinstance(node, dict | list) and node and (key is None or chance.random() < 0.85):
            holder, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = node[key]
        if holder is not None:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return document


CALIBRATION: Final = fit_record(record(load(8192), load(16384), load(32768)))
ARTIFACT: Final = to_yaml(CALIBRATION).encode()
RECORD: Final = msgspec.json.encode(record(load(8192), load(16384), load(32768)))
PLAN: Final = (
    b"matrix: {model: [a, b], kv_cache_type: [f16, q8_0]}\ninclude: [{model: c, ctx: '4096,8192'}]\ndefaults: {timeout: 60}\n"
)
CATALOG: Final = b"models:\n  'a:1': {ollama: 'a:1', vllm: 'org/a', gguf: {path: '/a.gguf', sha256: '00'}}\n"
TOML: Final = b"engine = 'ollama'\nctx = [8192, 16384]\ntimeout = 60.5\nstore = 'here'\n"
LINES: Final = lines()


LOG: Final = (GOLDEN / "llama-server/b10434/host-8192.log").read_bytes()


def numbers_changed(chance: random.Random, data: bytes) -> bytes:
    """A log that is whole but for a few of its numbers."""
    found = list(re.finditer(rb"\d+", data))
    for one in sorted(chance.sample(found, 3), key=lambda one: -one.start()):
        value = str(chance.choice((0, 1, 7, 111_111, 1 << 31, 10**15, 10**30))).encode()
        data = data[: one.start()] + value + data[one.end() :]
    return data


def of_gguf(chance: random.Random, folder: Path) -> None:
    """A header: what it says of a model."""
    path = folder / "m.gguf"
    if not path.exists():
        extra = {"llama.embedding_length": 64, "llama.attention.head_count": 4}
        write_gguf(folder / "whole.gguf", extra=extra)
    data = bytearray((folder / "whole.gguf").read_bytes()[:900] + b"\0" * 4096)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(900)
        value = chance.choice((0, 1, 9, 1 << 16, 1 << 26, (1 << 31) - 1, (1 << 64) - 1, chance.randrange(256)))
        piece = struct.pack("<Q", value)[: chance.choice((1, 4, 8))]
        data[at : at + len(piece)] = piece
    path.write_bytes(data)
    header = gguf.read_header(path)
    gguf.describe(header, "m", None)
    gguf.tensor_bytes(header)
    gguf.server_estimate(header, path.stat().st_size)


def of_artifact(chance: random.Random, _folder: Path) -> None:
    """A calibration: what is predicted, judged and refused of it."""
    if chance.random() < 0.5:
        text = broken(chance, ARTIFACT)
    else:
        text = json.dumps(bent(chance, msgspec.to_builtins(CALIBRATION))).encode()
    found = parse_calibration(text, "it")
    refusals(found, None)
    for context in (1, 8192, 1 << 20):
        predict(found, context, chance.choice((1, 8)))
        judge(found, context, 1, (24 << 30,), policy_of("llama-server"))
    compare(CALIBRATION, found, (policy_of("llama-server"), policy_of("llama-server")))
    to_yaml(found)
    escape(found.metadata.model.name)


def of_record(chance: random.Random, folder: Path) -> None:
    """A record: the constants that follow from it."""
    data = broken(chance, RECORD) if chance.random() < 0.3 else json.dumps(bent(chance, json.loads(RECORD))).encode()
    (folder / "record.json").write_bytes(data)
    refit(folder)


def of_plan(chance: random.Random, folder: Path) -> None:
    """A plan: its cells."""
    (folder / "plan.yaml").write_bytes(broken(chance, PLAN))
    for cell in load_plan(folder / "plan.yaml", here=True)[:4]:
        json.dumps([cell.title, cell.key, msgspec.to_builtins(cell.public())])


def of_catalog(chance: random.Random, folder: Path) -> None:
    """A catalog: its names."""
    (folder / "catalog.yaml").write_bytes(broken(chance, CATALOG))
    read_catalog(folder / "catalog.yaml")


def of_toml(chance: random.Random, folder: Path) -> None:
    """A configuration: its settings."""
    (folder / "harness.toml").write_bytes(broken(chance, TOML))
    read_file(folder / "harness.toml")


def of_import(chance: random.Random, folder: Path) -> None:
    """A log, and totals that somebody told: a calibration."""
    found = parse_log(mutated(chance, LINES) if chance.random() < 0.2 else numbers_changed(chance, LOG))
    totals = tuple(chance.choice((0, 1 << 30, 1 << 40, 1 << 60)) for _ in found)
    told = ImportOptions(log="it", totals=totals, model="m", chosen=tuple(range(1, len(found) + 1)), force=True)
    import_log(found, told, Store(folder / "store"))


TARGETS: Final[dict[str, Target]] = {
    "gguf": of_gguf, "artifact": of_artifact, "record": of_record, "plan": of_plan, "catalog": of_catalog, "toml": of_toml,
    "import": of_import,
}  # fmt: skip


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Refuse an input that takes long."""

    def late(_number: int, _frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(name: str, count: int, seed: int) -> None:
    """Try ``count`` inputs of one kind, the same ones at every run."""
    begin, refused = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(
        prefix="harness-fuzz-", dir=MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None
    ) as place:
        for number in range(count):
            chance = random.Random(f"{name} {seed} {number}")  # noqa: S311 - the same inputs at every run
            try:
                with in_time():
                    TARGETS[name](chance, Path(place))
            except HarnessError:
                refused += 1
            except BaseException:
                print(f"{name}: input {number} of seed {seed}")
                raise
    seconds = time.perf_counter() - begin
    print(f"{name}: {count} inputs in {seconds:.0f} s, {refused} refused, no other exception", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], default=[])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in options.targets or TARGETS:
        fuzz(name, options.count, options.seed)


if __name__ == "__main__":
    main()
