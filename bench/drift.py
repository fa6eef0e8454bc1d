"""How well a calibration repeats, and whether drift is found: ``make bench-drift``.

Five calibrations of the embedded model on host memory, each held against each other. Then upgrades acted out with a stand-in
for llama-server that differs in nothing, or in one figure by a chance amount: found must be exactly that, each time. About five
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any, Final
from unittest import mock

from click.testing import CliRunner

from harness.cli.main import cli
from harness.measure.timing import CpuWatch
from harness.store.yaml import read_calibration
from tests.support.gguf_file import write_gguf
from tests.support.rules import compare
from tests.support.stand_in import FIGURES, write_stand_in

RUNS: Final = 5
ROUNDS: Final = 20
#: A figure of the stand-in, the least and the largest change (in its own unit), and what must be found to have moved.
UPGRADES: Final[tuple[tuple[str, float, float, set[str]], ...]] = (
    ("compute_per_token", 64, 2048, {"compute_gb_per_10k"}),
    ("window_mib", 3, 60, {"fixed_cache_gb", "base_vram_gb"}),
    ("hidden_mib", 4, 60, {"overhead_gb", "base_vram_gb"}),
    ("decode_per_s", -30, -20, {"decode_tokens_per_s", "decode_tokens_per_s at 1536 tokens"}),
)


def call(folder: Path, *arguments: str) -> Any:
    """The data of one command, which must end with 0, or with 6 for a drift."""
    with contextlib.chdir(folder):
        answer = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    if answer["exit_code"] not in (0, 6):
        raise SystemExit(f"{arguments}: {answer['errors']}")
    return answer["data"]


def repeat(folder: Path, runs: int) -> None:
    """Print the spread of each figure over several runs, beside the error that its calibrations claim."""
    arguments = ("calibrate", "gemma3:270m", "--engine", "llama-server", "--gpus", "none", "--ctx", "4096,8192,16384")
    found = []
    for number in range(runs):
        answer = call(folder, *arguments, "--store", f"store-{number}")
        found.append(read_calibration(folder / answer["artifact"]))
    print(f"$ harness {' '.join(arguments)}    ({runs} times)")
    pairs = [compare(old, new) for old, new in combinations(found, 2)]
    for figure in pairs[0].figures:
        values = [value for pair in pairs for one in pair.figures if one.name == figure.name for value in (one.old, one.new)]
        numbers = [value for value in values if isinstance(value, int | float)]
        errors = [one.tolerance for pair in pairs for one in pair.figures if one.name == figure.name and one.tolerance]
        if numbers and errors:
            spread = max(numbers) - min(numbers)
            print(f"  {figure.name:<34} {min(numbers):12.6f} to {max(numbers):12.6f}: {spread:.6f}, error {min(errors):.6f}")
    moved = [figure.name for pair in pairs for figure in pair.moved]
    print(f"  moved in {len(pairs)} comparisons: {', '.join(moved) or 'nothing'}\n", flush=True)


def drill(folder: Path, rounds: int) -> None:
    """Print how often exactly what was changed was found, and how often nothing where nothing was."""
    chance = random.Random(7)  # noqa: S311 - the same upgrades each time
    write_gguf(folder / "small.gguf", train_context=8192)
    write_stand_in(folder / "b1")
    measure = ("calibrate", "small.gguf", "--engine", "llama-server", "--gpus", "none", "--ctx", "1024,2048,4096")
    call(folder, *measure, "--engine-binary", "./b1", "--store", "before")
    still = right = 0
    for number in range(rounds):
        name, least, most, expected = UPGRADES[number % len(UPGRADES)]
        amount = round(chance.uniform(least, most), 2)
        still += upgrade(folder) == set()
        found = upgrade(folder, **{name: FIGURES[name] + amount})
        right += found == expected
        print(f"  {name} {amount:+}: {', '.join(sorted(found)) or 'nothing'}", flush=True)
    print(
        f"  nothing changed: nothing found {still} of {rounds} times; one figure changed: exactly it {right} of {rounds} times"
    )


def upgrade(folder: Path, **changes: float) -> set[str]:
    """What ``diff`` says has moved after ``recalibrate --stale`` with another engine."""
    write_stand_in(folder / "b2", version="b2", **changes)
    shutil.rmtree(folder / "after", ignore_errors=True)
    shutil.copytree(folder / "before", folder / "after")
    (one,) = call(folder, "recalibrate", "--stale", "--engine-binary", "./b2", "--store", "after")["calibrations"]
    if [reason["name"] for reason in one["reasons"]] != ["engine"]:
        raise SystemExit(f"stale for {one['reasons']}")
    (pair,) = call(folder, "diff", "before", "after")["calibrations"]
    moved = {figure["name"] for figure in pair["figures"] if figure["moved"]}
    # The band below the window is another line of the same parts.
    return {name for name in moved if not name.startswith("band ")} or moved


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"calibrations of the embedded model ({RUNS}; 0: none)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"upgrades acted out ({ROUNDS}; 0: none)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.runs > 1:
            repeat(Path(name), options.runs)
        if options.rounds > 0:
            print("$ harness recalibrate --stale, harness diff    (a stand-in for llama-server)")
            with mock.patch.object(CpuWatch, "by_others", return_value=0.0):  # its speeds are set, whatever else goes on here
                drill(Path(name), options.rounds)


if __name__ == "__main__":
    main()
