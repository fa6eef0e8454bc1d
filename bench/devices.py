"""Verdicts over two and three devices against what llama.cpp's fit decides; a table for docs/explanation/devices.md.

    make bench-devices ARGS="--engine DIR [--models qwen2,lfm2]"

DIR holds llama-server, ggml-rpc-server and llama-fit-params of a build whose remote devices work at the same time (b11434
does). Models are calibrated on one, two and three ``ggml-rpc-server -d CPU`` at contexts up to 4,096, then judged over two and
three of them: by the calibration on as many, and by that on one. Cards of any size are acted out by ``--fit-target``, one value
a device; llama-fit-params decides, prints and ends. It reserves logits for a whole batch, which a server does not: devices with
the output take more here than calibrations, which ask the server, say.
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
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration
from harness.options import RunOptions
from harness.prediction.verdict import Verdict
from harness.store.store import Store
from harness.units import MIB
from tests.support.rules import judge
from tests.support.truth import free_port
from tests.support.waiting import until

CONTEXTS: Final = (8192, 49_152)
SHARES: Final = (1.3, 1.05, 1.011, 0.989, 0.95, 0.8, 0.5)
#: One device at its edge, the others with room.
EDGES: Final = (1.011, 0.989, 0.9)
#: Free memory of the devices, in parts of the largest.
SIZES: Final = ((1.0, 1.0), (1.0, 0.5), (1.0, 1.0, 1.0), (0.5, 1.0, 1.0))
#: What every remote device of the kind CPU says is free: all of the machine's memory (ggml-cpu.cpp).
FREE: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_FREE: Final = re.compile(r"- (RPC\d+) \(.*:\s*(\d+) total,\s*(\d+) used,\s*(-?\d+) free vs\. target of\s*(\d+)")
#: The options with which the engine would go on; experts that go to the next device are overrides too.
_CHOSEN: Final = re.compile(r"^-c \d+ -ngl \d+ -ts (?P<split>[\d,]+)", re.MULTILINE)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One set of cards: MiB that each may hold; ``used`` by the engine's first split, ``layers`` where it changed it.

    ``full``: nothing is on the host; ``kept``: in the first split.
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


def budgets_of(used: Sequence[int]) -> list[tuple[int, ...]]:
    """Sets of cards by what they may hold, MiB: all in proportion, cards of different size, one device at its edge."""
    found = [tuple(round(sum(used) * share * size / sum(sizes)) for size in sizes)
             for sizes in SIZES if len(sizes) == len(used) for share in SHARES]  # fmt: skip
    for device in range(len(used)):
        found += [tuple(round(one * (share if index == device else 1.3)) for index, one in enumerate(used)) for share in EDGES]
    return found


def cases(engine: Path, ports: Sequence[int], model: Path, calibrations: Sequence[Calibration]) -> list[list[Case]]:
    """Every context on every set of as many cards as there are ports, judged by each calibration."""
    found: list[list[Case]] = [[] for _ in calibrations]
    total = (calibrations[0].metadata.model.layers or 0) + 1
    for context in CONTEXTS:
        first = _FREE.findall(decide(engine, ports, model, context, [0] * len(ports)))
        used = tuple(int(row[2]) for row in first)
        for budgets in budgets_of(used):
            targets = [FREE // MIB - one for one in budgets]
            text = decide(engine, ports, model, context, targets)
            kept, chosen = "no changes needed" in text, _CHOSEN.search(text)
            split = () if kept or chosen is None else tuple(map(int, chosen["split"].split(",")))
            layers = () if kept else (*split, *(0,) * (len(ports) - len(split)))
            full = kept or (sum(layers) == total and "=CPU" not in text[chosen.start() if chosen else 0 :])
            for calibration, some in zip(calibrations, found, strict=True):
                # The engine splits by what is free, which is alike on every one of these devices.
                env = {"LLAMA_ARG_FIT_TARGET": ",".join(map(str, targets))}
                settings = msgspec.structs.replace(calibration.metadata.settings, env=env)
                metadata = msgspec.structs.replace(calibration.metadata, settings=settings)
                acted = msgspec.structs.replace(calibration, metadata=metadata)
                some.append(
                    Case(
                        model=model.stem, context=context, budgets=budgets, full=full, kept=kept, layers=layers, used=used,
                        verdict=judge(acted, context, 1, (FREE,) * len(ports)),
                    )
                )  # fmt: skip
    return found


def false_fits(case: Case) -> bool:
    """Said to fit, and something went to the host."""
    return case.verdict.verdict == "fits" and not case.full


def false_offload(case: Case) -> bool:
    """Said to spill, without doubt, and every layer is on a device."""
    return case.verdict.verdict == "offload" and case.full and not case.verdict.tight


def odd(case: Case) -> bool:
    """Whether a case is worth a look."""
    layers = tuple(one.layers for one in case.verdict.devices)
    return (
        false_fits(case)
        or false_offload(case)
        or (case.verdict.verdict == "offload" and not case.full and layers != case.layers)
    )


def row(name: str, found: Sequence[Case]) -> str:
    """A line of the table."""
    spilled = [case for case in found if not case.full and case.verdict.verdict == "offload"]
    off = [
        max(abs((one.layers or 0) - layers) for one, layers in zip(case.verdict.devices, case.layers, strict=True))
        for case in spilled
    ]
    # The log has whole MiB, rounded down.
    bytes_off = [
        max(abs(one.required_bytes / MIB - used - 0.5) - 0.5, 0) / used
        for case in found
        if case.kept and case.verdict.verdict == "fits"
        for one, used in zip(case.verdict.devices, case.used, strict=True)
    ]
    cells = [
        name, len(found), sum(map(false_fits, found)), sum(map(false_offload, found)),
        sum(case.verdict.verdict == "offload" and case.full and not case.kept and not case.verdict.tight for case in found),
        sum(case.verdict.tight for case in found),
        f"{off.count(0)} of {len(spilled)}", max(off, default=0), f"{max(bytes_off, default=0):.2%}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD: Final = (
    "| model, calibrated on | sets of cards | false fits | false offloads | of these rearranged sets "
    "| said to be tight | layers exact on each | off by at most | bytes of a device off |\n" + "|---" * 9 + "|"
)


def calibrated(engine: Path, ports: Sequence[int], path: Path, folder: Path) -> Calibration:
    """A calibration on these devices, which answers for larger contexts too."""
    asked = RunOptions(
        model=str(path), engine="llama-server", contexts=(1024, 2048, 4096), flash_attention="on", force=True,
        gpus=",".join(f"RPC{index}" for index in range(len(ports))), engine_binary=str(engine / "llama-server"), speed=False,
        env={"LLAMA_ARG_RPC": ",".join(f"127.0.0.1:{port}" for port in ports), "LLAMA_ARG_FIT": "off"},
    )  # fmt: skip
    calibration = prepare(asked, Store(folder / f"{path.stem}-{len(ports)}"), folder).calibrate(Observer()).calibration
    quality = msgspec.structs.replace(calibration.metadata.quality, valid_to=max(CONTEXTS))
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, quality=quality))


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
            on_one, *on_more = (calibrated(options.engine, ports[:count], path, folder) for count in (1, 2, 3))
            by_one: list[Case] = []
            by_more: list[Case] = []
            for few, on_these in zip((ports[:2], ports), on_more, strict=True):
                one, more = cases(options.engine, few, path, (on_one, on_these))
                by_one, by_more = by_one + one, by_more + more
            for what, found in (("the same devices", by_more), ("one device", by_one)):
                for case in filter(odd, found):
                    print(case.model, case.context, case.budgets, case.used, case.layers, case.verdict.devices, file=sys.stderr)
                wrong += sum(map(false_fits, found))
                print(row(f"{name}, {what}", found), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
