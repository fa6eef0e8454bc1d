"""Measure the figures that the documentation quotes, and print each with the command that it comes from.

    make bench [ARGS="--ctx 8192,16384,32768,65536"]

Calibrates the embedded model on host memory at small contexts, loads it at contexts that were never part of that, and
compares. Nothing is written outside a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from harness.units import GIB

MODEL: Final = "gemma3:270m"
NEAR: Final = "4096,6144,12288"
FAR: Final = "8192,16384,32768,65536"
#: The engine is told of a longer training context, so that contexts beyond 32,768 can be loaded.
OVERRIDE: Final = "LLAMA_ARG_OVERRIDE_KV=gemma3.context_length=int:131072"
#: Three of 18 layers attend to everything: keys and values of 256 elements, two bytes each.
EXPECTED_SLOPE_KIB: Final = 3.0
REPEATS: Final = 7


def show(command: list[str], *figures: str) -> None:
    """Print figures below the command that gave them."""
    words = ["harness", *command[3:]] if command[1:3] == ["-m", "harness"] else ["python", *command[1:]]
    print(f"$ {shlex.join(words)}")
    print(*(f"  {figure}" for figure in figures), "", sep="\n", flush=True)


def calibrate(store: Path, contexts: str, *more: str) -> tuple[list[str], dict[str, Any], dict[str, Any], int]:
    """Command, calibration, record and the command's own peak resident memory (bytes)."""
    command = [sys.executable, "-m", "harness", "calibrate", MODEL, "--engine", "llama-server", "--gpus", "none"]
    command += ["--no-speed", "--json", "--ctx", contexts, "--env", OVERRIDE, *more]
    memory = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env={**os.environ, "HARNESS_STORE": str(store)}, stdout=out, stderr=err)
        while process.poll() is None:
            memory = max(memory, peak_bytes(process.pid))
            time.sleep(0.02)
        out.seek(0)
        answer = json.loads(out.read())
    if process.returncode:
        sys.exit(f"{shlex.join(command)}: {answer['errors']}")
    record = json.loads(Path(answer["data"]["record"]).read_text())
    return command, answer["data"]["calibration"], record, memory


def peak_bytes(pid: int) -> int:
    """Peak resident memory of one process so far, without its children (``VmHWM`` of proc_pid_status(5)); 0 at its end."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def own_seconds(record: dict[str, Any]) -> tuple[float, float]:
    """Harness's own seconds: in each load (mean), and in the whole run outside of loads."""
    loads = record["loads"]
    within = [
        (load["ended"] - load["ready"]) - load.get("settle_seconds", 0.0) - load.get("request_seconds", 0.0) for load in loads
    ]
    outside = record["seconds"] - sum(load["ended"] - load["started"] for load in loads)
    return sum(within) / len(within), outside


def predict(store: Path, context: int) -> tuple[list[str], float]:
    """Command, and the predicted GiB."""
    command = [sys.executable, "-m", "harness", "predict", MODEL, "--ctx", str(context), "--json"]
    environment = {**os.environ, "HARNESS_STORE": str(store)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return command, float(json.loads(done.stdout)["data"]["total_bytes"]) / GIB


def best_seconds(commands: list[list[str]], store: Path) -> list[float]:
    """The fastest of several runs of each command; they take turns, so that other work on the machine slows all alike."""
    found: list[list[float]] = [[] for _ in commands]
    for _ in range(REPEATS):
        for command, seconds in zip(commands, found, strict=True):
            begin = time.perf_counter()
            subprocess.run(command, env={**os.environ, "HARNESS_STORE": str(store)}, stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - begin)
    return [min(seconds) for seconds in found]


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx", default=FAR, help=f"contexts to predict ({FAR})")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = Path(name)
        command, near, record, memory = calibrate(store, NEAR)
        slope = near["constants"]["kv_cache_gb_per_10k"] * GIB / 10_000 / 1024
        error = 100 * (slope / EXPECTED_SLOPE_KIB - 1)
        within, outside = own_seconds(record)
        show(
            command,
            f"KV slope {slope:.4f} KiB/token ({error:+.3f} % of {EXPECTED_SLOPE_KIB:.3f})",
            f"harness's own time {within:.2f} s a load, {outside:.2f} s around them (from the record)",
            f"harness's own peak memory {memory / 1e6:.0f} MB (VmHWM)",
        )
        command, far, _, _ = calibrate(store, options.ctx, "--variant", "far")
        show(command, "measured, to compare with the predictions below")
        for load in far["metadata"]["quality"]["loads"]:
            asked, predicted = predict(store, load["context"])
            measured = load["total_gb"]
            error = 100 * (predicted / measured - 1)
            show(asked, f"predicted {predicted:.4f} GiB, measured {measured:.4f} GiB: {error:+.2f} %")
        program = [sys.executable, "-m", "harness"]
        commands = [
            [sys.executable, "-c", "import click, yaml"],
            [*program, "show", MODEL],
            [*program, "predict", MODEL, "--ctx", "8192"],
            [*program, "check", f"{MODEL}@8192"],
        ]
        floor, *own = best_seconds(commands, store)
        show(commands[0], f"{1000 * floor:.0f} ms")
        for command, seconds in zip(commands[1:], own, strict=True):
            show(command, f"{1000 * seconds:.0f} ms, {seconds / floor:.1f} times the interpreter with click and yaml")


if __name__ == "__main__":
    main()
