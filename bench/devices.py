"""Verdicts over two and three devices against what llama.cpp's fit decides; a table for docs/explanation/devices.md.

    make bench-devices ARGS="--engine DIR [--models qwen2,lfm2]"

DIR holds llama-server, ggml-rpc-server and llama-fit-params of a build whose remote devices work at the same time (b11434
does). Models are calibrated on one ``ggml-rpc-server -d CPU`` at contexts up to 4,096, then judged over two and three of
them. Cards of any size are acted out by ``--fit-target``, one value a device; llama-fit-params decides, prints and ends.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec

from bench.models import MODELS
from harness.measure.events import Silent
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration
from harness.options import RunOptions
from harness.prediction.verdict import Verdict
from harness.store.store import Store
from harness.units import MIB
from tests.support.rules import judge
from tests.support.truth import free_port
from tests.support.waiting import until

CONTEXTS: Final = (8192, 32768)
SHARES: Final = (1.3, 1.05, 1.011, 0.989, 0.95, 0.8, 0.5)
#: Free memory of the second and third device, in parts of the first one's.
SIZES: Final = ((1.0, 1.0), (1.0, 0.5), (1.0, 1.0, 1.0), (0.5, 1.0, 1.0))
_FREE: Final = re.compile(r"- (RPC\d+) \(.*:\s*(\d+) total,\s*(\d+) used,\s*(-?\d+) free vs\. target of\s*(\d+)")
_PLACED: Final = re.compile(r"- (RPC\d+) \(.*:\s*(\d+) layers(?: \(\s*(\d+) overflowing\))?,\s*(\d+) MiB used")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One set of cards: MiB that each may hold; ``used`` by the engine's first split, ``layers`` where it changed it.

    ``full``: every layer is on a device; ``kept``: in the first split.
    """

    model: str
    context: int
    budgets: tuple[int, ...]
    full: bool
    kept: bool
    used: tuple[int, ...]
    layers: tuple[int, ...]
    verdict: Verdict


def decide(engine: Path, ports: Sequence[int], model: Path, context: int, targets: Sequence[int]) -> str:
    """What llama-fit-params prints."""
    remote = ",".join(f"127.0.0.1:{port}" for port in ports)
    names = ",".join(f"RPC{index}" for index in range(len(ports)))
    done = subprocess.run(
        [
            engine / "llama-fit-params", "-m", model, "--rpc", remote, "-dev", names, "-c", str(context), "-np", "1",
            "-b", "2048", "-ub", "512", "-fa", "on", "--fit-target", ",".join(map(str, targets)), "--log-verbosity", "4",
        ],
        env={**os.environ, "LD_LIBRARY_PATH": str(engine)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def cases(engine: Path, ports: Sequence[int], model: Path, calibration: Calibration) -> list[Case]:
    """Every context on every set of cards."""
    found = []
    for context in CONTEXTS:
        for sizes in SIZES:
            few = ports[: len(sizes)]
            first = _FREE.findall(decide(engine, few, model, context, [0] * len(sizes)))
            free = [int(row[2]) + int(row[3]) for row in first]
            needed = sum(int(row[2]) for row in first)
            for share in SHARES:
                budgets = tuple(round(needed * share * size / sum(sizes)) for size in sizes)
                text = decide(engine, few, model, context, [all_ - one for all_, one in zip(free, budgets, strict=True)])
                last = {row[0]: row[1:] for row in _PLACED.findall(text)}  # devices are filled from the last to the first
                placed = [last.get(f"RPC{index}", ("0", "", "0")) for index in range(len(sizes))]
                full = "no changes needed" in text
                layers = () if full else tuple(int(row[0]) for row in placed)
                total = (calibration.metadata.model.layers or 0) + 1
                kept = full
                full = full or (sum(layers) == total and not any(int(row[1] or 0) for row in placed))
                # The engine splits by what is free, which is alike on every one of these devices.
                shared = {"LLAMA_ARG_FIT_TARGET": ",".join(str(all_ - one) for all_, one in zip(free, budgets, strict=True))}
                settings = msgspec.structs.replace(calibration.metadata.settings, env=shared)
                acted = msgspec.structs.replace(
                    calibration, metadata=msgspec.structs.replace(calibration.metadata, settings=settings)
                )
                found.append(
                    Case(
                        model=model.stem, context=context, budgets=budgets, full=full, kept=kept, layers=layers,
                        used=tuple(int(row[2]) for row in first),
                        verdict=judge(acted, context, 1, tuple(one * MIB for one in free)),
                    )
                )  # fmt: skip
    return found


def row(name: str, found: Sequence[Case]) -> str:
    """A line of the table."""
    spilled = [case for case in found if not case.full and case.verdict.verdict == "offload"]
    exact = sum(tuple(one.layers for one in case.verdict.devices) == case.layers for case in spilled)
    bytes_off = [
        abs(one.required_bytes / MIB - used) / used
        for case in found
        if case.kept and case.verdict.verdict == "fits"
        for one, used in zip(case.verdict.devices, case.used, strict=True)
    ]
    cells = [
        name, len(found),
        sum(case.verdict.verdict == "fits" and not case.full for case in found),
        sum(case.verdict.verdict == "offload" and case.kept and not case.verdict.tight for case in found),
        sum(case.verdict.verdict == "offload" and case.full and not case.kept and not case.verdict.tight for case in found),
        sum(case.verdict.tight for case in found),
        f"{exact} of {len(spilled)}", f"{max(bytes_off, default=0):.1%}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD: Final = (
    "| model | sets of cards | false fits | false offloads | all on devices, one below its margin | said to be tight "
    "| layers exact on each | bytes of a device off |\n|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--models", default="qwen2,llama,gemma3,lfm2,qwen3moe")
    options = parser.parse_args()
    ports = [free_port() for _ in range(3)]
    wrong = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-devices-")))
        log = folder / "devices.log"
        for port in ports:
            server = subprocess.Popen(
                [options.engine / "ggml-rpc-server", "-d", "CPU", "-p", str(port)],
                env={**os.environ, "LD_LIBRARY_PATH": str(options.engine)}, stdout=log.open("ab"), stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(server.wait, 60)
            stack.callback(server.kill)
        until(lambda: log.read_text(errors="replace").count("Devices") >= len(ports) or log.stat().st_size > 0, "the devices")
        print(HEAD, flush=True)
        for name in options.models.split(","):
            path = folder / f"{name}.gguf"
            MODELS[name]().write(path)
            asked = RunOptions(
                model=str(path), engine="llama-server", contexts=(1024, 2048, 4096), flash_attention="on", gpus="RPC0",
                engine_binary=str(options.engine / "llama-server"), speed=False, force=True,
                env={"LLAMA_ARG_RPC": f"127.0.0.1:{ports[0]}", "LLAMA_ARG_FIT": "off"},
            )  # fmt: skip
            calibration = prepare(asked, Store(folder / name), folder).calibrate(Silent()).calibration
            wide = msgspec.structs.replace(calibration.metadata.quality, valid_to=max(CONTEXTS))
            calibration = msgspec.structs.replace(
                calibration, metadata=msgspec.structs.replace(calibration.metadata, quality=wide)
            )
            found = cases(options.engine, ports, path, calibration)
            for case in found:
                if (case.verdict.verdict == "fits") > case.full or (case.verdict.verdict != "fits") * case.kept:
                    print(case.model, case.context, case.budgets, case.used, case.verdict.devices, file=sys.stderr)
            wrong += sum(case.verdict.verdict == "fits" and not case.full for case in found)
            print(row(name, found), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
