"""Verdicts over two and three devices against what llama-server does; writes the tables of docs/explanation/devices.md.

    make bench-devices ARGS="--engine DIR [--models qwen2,lfm2]"

DIR holds llama-server and ggml-rpc-server of a build whose remote devices work at the same time (b11434 does). Models are
calibrated on one, two and three ``ggml-rpc-server -d CPU`` at contexts up to 4,096, then judged over two and three of them: by
the calibration on as many, and by that on one. Cards of any size are acted out by ``--fit-target``, one value a device. The
truth is in the server's log: layers and bytes of each device, before it loads any weights (common/fit.cpp); it is ended then.
The devices survive that here because they ignore SIGPIPE, as Python does. All models write the page; some of them only print.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final
from unittest import mock

import msgspec

from bench.fitting import DONE, decision
from bench.models import MODELS
from harness.engines.llama_server.recipe import LlamaServer
from harness.measure import dry_runs
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration
from harness.options import RunOptions
from harness.prediction.layout import default_split
from harness.prediction.verdict import Verdict
from harness.store.store import Store
from harness.units import MIB
from tests.support.rules import judge
from tests.support.truth import free_port
from tests.support.waiting import until

PAGE: Final = Path(__file__).parents[1] / "docs" / "explanation" / "devices.md"
BEGIN, END = "<!-- devices -->", "<!-- end of devices -->"
#: Dense, with an output matrix of its own, with windows, hybrid, with experts.
ALL: Final = ("qwen2", "llama", "gemma3", "lfm2", "qwen3moe")
CONTEXTS: Final = (8192, 49_152)
SHARES: Final = (1.3, 1.003, 0.997, 0.95, 0.8, 0.5, 0.3)
#: One device at its edge, the others with room.
EDGES: Final = (1.011, 1.003, 0.997, 0.989)
#: Free memory of the devices, in parts of the largest.
SIZES: Final = ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0, 1.0))
#: What every remote device of the kind CPU says is free: all of the machine's memory (ggml-cpu.cpp).
FREE: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_FIRST: Final = re.compile(r"- RPC\d+ \(.*:\s*\d+ total,\s*(\d+) used,")
#: A layout that the engine tries; the last one that it keeps is what it goes on with (``set ngl_per_device[``).
_TRIED: Final = re.compile(r"id=\d+, n_layer=\s*(\d+), n_part=\s*(\d+), overflow_type=(\d), mem=\s*(\d+) MiB")
_KEPT: Final = "set ngl_per_device["
#: ``LAYER_FRACTION_MOE``: all experts of a layer are on the host.
_ON_HOST: Final = 4


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine decided: layers and whole MiB of each device.

    ``full``: nothing is on the host; ``kept``: its first split.
    """

    kept: bool
    full: bool
    layers: tuple[int, ...]
    used: tuple[int, ...]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One set of cards, MiB that each may hold, what the engine did there and what harness said."""

    model: str
    context: int
    budgets: tuple[int, ...]
    truth: Truth
    verdict: Verdict

    @property
    def layers(self) -> tuple[int | None, ...]:
        """Of each device, as harness said."""
        return tuple(one.layers for one in self.verdict.devices)

    @property
    def false_fits(self) -> bool:
        """Said to fit, and something went to the host."""
        return self.verdict.verdict == "fits" and not self.truth.full

    @property
    def false_offload(self) -> bool:
        """Said to spill, without doubt, and every layer is on a device."""
        return self.verdict.verdict == "offload" and self.truth.full and not self.verdict.tight

    @property
    def layers_off(self) -> int:
        """Of the device where it is most."""
        return max(abs((one or 0) - true) for one, true in zip(self.layers, self.truth.layers, strict=True))

    @property
    def bytes_off(self) -> list[tuple[float, float]]:
        """MiB that each device is off, and that it takes, where the layout is the engine's; the log's MiB are rounded down."""
        if self.verdict.verdict != "fits" or self.layers != self.truth.layers:
            return []
        pairs = zip(self.verdict.devices, self.truth.used, strict=True)
        return [(max(abs(one.required_bytes / MIB - used - 0.5) - 0.5, 0), used) for one, used in pairs if used]

    @property
    def unbounded(self) -> bool:
        """Whether a device is off by more than was said."""
        return any(off > (self.verdict.uncertainty_bytes or 0) / MIB for off, _ in self.bytes_off)


def decide(engine: Path, ports: Sequence[int], model: Path, context: int, targets: Sequence[int]) -> Truth:
    """Have llama-server place the layers, and end it before it loads them."""
    remote = ",".join(f"127.0.0.1:{port}" for port in ports)
    names = ",".join(f"RPC{index}" for index in range(len(ports)))
    lines = decision(
        [
            engine / "llama-server", "-m", model, "--rpc", remote, "-dev", names, "-c", str(context), "-np", "1",
            "-b", "2048", "-ub", "512", "-fa", "on", "--fit-target", ",".join(map(str, targets)), "--no-ui", "--offline",
            "--host", "127.0.0.1", "--port", str(free_port()), "--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps",
        ],
        {**os.environ, "LD_LIBRARY_PATH": str(engine)},
    )  # fmt: skip
    return read_decision(lines, len(ports))


def read_decision(lines: Sequence[str], devices: int) -> Truth:
    """What the log of the fit says."""
    text = "".join(lines)
    if DONE not in text:
        raise SystemExit(f"no decision: {text[-600:]}")
    first = tuple(int(used) for used in _FIRST.findall(text)[-devices:])
    if "no changes needed" in text:
        return Truth(kept=True, full=True, layers=(), used=first)
    tried: list[tuple[int, ...]] = []
    final: list[tuple[int, ...]] = []
    for line in lines:
        if found := _TRIED.search(line):
            tried.append(tuple(map(int, found.groups())))
        elif _KEPT in line or not final:
            final = tried[-devices:]
    layers, partial, overflow, used = zip(*final, strict=True)
    total = max(sum(one[0] for one in tried[at : at + devices]) for at in range(0, len(tried), devices))
    # The output is the last of the partial layers of its device, and has nothing that could be elsewhere; a single other one
    # may give what it has no room for to the next device.
    output = max((index for index, count in enumerate(layers) if count), default=0)
    without = [max(count - (index == output), 0) for index, count in enumerate(partial)]
    on_host = any(
        count > 1 or (count == 1 and (kind == _ON_HOST or index == devices - 1))
        for index, (count, kind) in enumerate(zip(without, overflow, strict=True))
    )
    return Truth(kept=False, full=sum(layers) == total and not on_host, layers=layers, used=used)


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
    first_split = tuple(part.layers for part in default_split(total, (1.0,) * len(ports)))
    for context in CONTEXTS:
        for budgets in budgets_of(decide(engine, ports, model, context, [0] * len(ports)).used):
            targets = [FREE // MIB - one for one in budgets]
            truth = decide(engine, ports, model, context, targets)
            truth = msgspec.structs.replace(truth, layers=first_split) if truth.kept else truth
            for calibration, some in zip(calibrations, found, strict=True):
                # The engine splits by what is free, which is alike on every one of these devices.
                remote = calibration.metadata.settings.env["LLAMA_ARG_RPC"]
                env = {"LLAMA_ARG_RPC": remote, "LLAMA_ARG_FIT_TARGET": ",".join(map(str, targets))}
                settings = msgspec.structs.replace(calibration.metadata.settings, env=env)
                metadata = msgspec.structs.replace(calibration.metadata, settings=settings)
                acted = msgspec.structs.replace(calibration, metadata=metadata)
                verdict = judge(acted, context, 1, (FREE,) * len(ports))
                some.append(Case(model=model.stem, context=context, budgets=budgets, truth=truth, verdict=verdict))
    return found


def row(name: str, found: Sequence[Case]) -> str:
    """A line of the table."""
    changed = [case.layers_off for case in found if not case.truth.kept]
    shares = [off / used for case in found for off, used in case.bytes_off]
    cells = [
        name, len(found), sum(case.false_fits for case in found), sum(case.false_offload for case in found),
        sum(case.verdict.tight for case in found), f"{changed.count(0)} of {len(changed)}", max(changed, default=0),
        f"{max(shares, default=0):.2%}", sum(case.unbounded for case in found),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD: Final = (
    "| model | sets of cards | false fits | false offloads | tight | layers exact | off by at most "
    "| bytes of a device off | beyond the bound |\n" + "|---" * 9 + "|"
)


def calibrated(engine: Path, ports: Sequence[int], path: Path, folder: Path) -> Calibration:
    """A calibration on these devices, which answers for larger contexts too."""
    asked = RunOptions(
        model=str(path), engine="llama-server", contexts=(1024, 2048, 4096), flash_attention="on", force=True,
        gpus=",".join(f"RPC{index}" for index in range(len(ports))), engine_binary=str(engine / "llama-server"), speed=False,
        env={"LLAMA_ARG_RPC": ",".join(f"127.0.0.1:{port}" for port in ports), "LLAMA_ARG_FIT": "off"},
    )  # fmt: skip
    # Dry runs are ended where they have printed, as on cards of this machine, and have the time that slow machines need.
    with (
        mock.patch.object(LlamaServer, "ends_dry_runs", return_value="printed"),
        mock.patch.object(dry_runs, "SETS_LIMIT", 600),
    ):
        calibration = prepare(asked, Store(folder / f"{path.stem}-{len(ports)}"), folder).calibrate(Observer()).calibration
    quality = msgspec.structs.replace(calibration.metadata.quality, valid_to=max(CONTEXTS))
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, quality=quality))


def write_page(engine: str, tables: dict[str, list[str]]) -> None:
    """Put the tables into the page."""
    text = "\n\n".join(f"Calibrated on {what} ({engine}):\n\n" + "\n".join([HEAD, *rows]) for what, rows in tables.items())
    before, after = PAGE.read_text().split(BEGIN)[0], PAGE.read_text().split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--models", help="some of them, separated by commas: prints alone")
    options = parser.parse_args()
    ports = [free_port() for _ in range(3)]
    wrong = 0
    tables: dict[str, list[str]] = {"as many devices": [], "one device": []}
    version = ""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-devices-")))
        log = folder / "devices.log"
        for port in ports:
            server = subprocess.Popen(
                [options.engine / "ggml-rpc-server", "-d", "CPU", "-p", str(port)], restore_signals=False,
                env={**os.environ, "LD_LIBRARY_PATH": str(options.engine)}, stdout=log.open("ab"), stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(server.wait, 60)
            stack.callback(server.kill)
        until(lambda: log.read_text(errors="replace").count("Devices") >= len(ports) or log.stat().st_size > 0, "the devices")
        print(HEAD, flush=True)
        for name in (options.models or ",".join(ALL)).split(","):
            path = folder / f"{name}.gguf"
            MODELS[name]().write(path)
            began = time.monotonic()
            on_one, *on_more = (calibrated(options.engine, ports[:count], path, folder) for count in (1, 2, 3))
            version = f"llama.cpp {on_one.metadata.engine.version}"
            took = time.monotonic() - began
            found: dict[str, list[Case]] = {what: [] for what in tables}
            for few, on_these in zip((ports[:2], ports), on_more, strict=True):
                for what, some in zip(tables, cases(options.engine, few, path, (on_these, on_one)), strict=True):
                    found[what] += some
            for what, some in found.items():
                for case in some:
                    if case.false_fits or case.false_offload or case.unbounded or (case.layers_off and not case.truth.kept):
                        devices = [(one.layers, one.required_bytes // MIB) for one in case.verdict.devices]
                        said = (case.verdict.verdict, case.verdict.tight, (case.verdict.uncertainty_bytes or 0) // MIB, devices)
                        print(what, case.model, case.context, case.budgets, case.truth, *said, file=sys.stderr, flush=True)
                wrong += sum(case.false_fits for case in some)
                tables[what].append(row(name, some))
                print(f"{tables[what][-1]} {what}", flush=True)
            path.unlink()
            print(
                f"{name}: {took:.0f} s calibrating, {time.monotonic() - began - took:.0f} s judging",
                file=sys.stderr,
                flush=True,
            )
    if options.models is None:
        write_page(version, tables)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
