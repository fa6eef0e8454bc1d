"""Predictions against real loads, at contexts that were never loaded; the table of docs/explanation/accuracy.md.

    make bench-accuracy [ARGS="--models dense,moe --print-only"]

Six models, three settings of attention, with the batch pinned and as Ollama chooses it, one to four slots. Every model is
calibrated at contexts up to 32,768 with harness's default plan; then it is loaded elsewhere, up to its training length. The
device is this machine's CPU behind ggml-rpc-server, so no GPU is needed, and for two models also Mesa's software GPU. Beside
harness stand, on the same points, one load at 32,768 tokens (base = total - KV, slope = KV / context) and the estimate that
Ollama makes before a load (llm/llama_server.go, PredictServerVRAM, >= 0.30).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from harness.engines.gguf import read_header
from harness.errors import HarnessError
from harness.model.calibration import Calibration
from harness.model.facts import LoadFacts
from harness.model.record import Record
from harness.prediction.memory import predict
from harness.store.catalog import gguf_path, read_catalog
from harness.units import GIB, MIB
from tests.support import rpc
from tests.support.f16 import rpc_weights
from tests.support.synthetic import MODELS, TRAIN_CONTEXTS
from tests.support.truth import MODES, OLLAMA_BATCHES, Device, Mode, SoftwareGpu, Truth, calibrate_on, load_truth

PAGE: Final = Path(__file__).parents[1] / "docs" / "explanation" / "accuracy.md"
CONTEXTS: Final = (2048, 4352, 24576, 65536, 131072)
SLOT_CONTEXT: Final = 12288
GEMMA: Final = "gemma3-270m"
SOFTWARE_GPU: Final = (GEMMA, "dense")
#: Loads above this are reserved and not made resident: they are larger than this machine.
RESIDENT: Final = 6 * GIB
#: Largest errors allowed.
TARGETS: Final = {"pinned": 0.001, "automatic": 0.005, "slots": 0.005, "software GPU": 0.001}


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be predicted; ``override`` tells the engine of a longer training context."""

    name: str
    path: Path
    train_context: int
    override: tuple[str, int] | None = None

    def contexts(self) -> list[int]:
        """Five contexts that no calibration loads, the last one its training length."""
        return [*CONTEXTS[:-2], max(self.train_context // 2, 49152), self.train_context]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load and three predictions of it, bytes; ``beyond_log`` is what the device's process took beyond the log."""

    model: str
    mode: str
    case: str
    context: int
    num_batch: int
    num_parallel: int
    truth: int
    harness: int
    one_point: float
    ollama: float
    beyond_log: int | None

    def error(self, which: str) -> float:
        """Relative error of one prediction."""
        return float(getattr(self, which)) / self.truth - 1


def subjects(folder: Path, wanted: Iterable[str]) -> Iterator[Subject]:
    """The models, written or put together."""
    for name in wanted:
        if name == GEMMA:
            catalog = read_catalog(Path(__file__).parents[1] / "models" / "catalog.yaml")
            path = rpc_weights(gguf_path("gemma3:270m", catalog.models["gemma3:270m"]))
            yield Subject(name=name, path=path, train_context=131072, override=("gemma3", 131072))
        else:
            path = folder / f"{name}.gguf"
            MODELS[name](path)
            yield Subject(name=name, path=path, train_context=TRAIN_CONTEXTS[name])


def ollama_estimate(path: Path, cells: int) -> float:
    """``PredictServerVRAM``: the file, and keys and values of every layer as F16, with the fewest KV heads of any layer."""
    header = read_header(path)

    def numbers(key: str) -> list[int]:
        value: Any = header.field(key)
        return list(value) if isinstance(value, list) else [value]

    kv_heads = max(min(numbers("attention.head_count_kv")), 1)
    width = header.field("embedding_length") / max(numbers("attention.head_count"))
    return float(path.stat().st_size + 2 * header.field("block_count") * kv_heads * width * cells * 2)


def one_point(facts: LoadFacts, device: str, logged: int, cells: int) -> float:
    """``base = total - KV`` and ``slope = KV / cells`` of one load."""
    cache = facts.devices[device].kv_cache_bytes or 0
    return logged - cache + cache / (facts.context_cells or 1) * cells


def batch_of(context: int) -> int:
    """The physical batch that Ollama would choose."""
    return next(batch for limit, batch in OLLAMA_BATCHES if context <= limit)


class Bench:
    """Makes the loads; keeps the points and what it calibrated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[Point] = []
        self.calibrations = 0
        self.worst_own_error = 0.0

    def calibrate(self, device: Device, subject: Subject, mode: Mode, *, as_ollama: bool) -> tuple[Record, Calibration]:
        def measured() -> tuple[Record, Calibration]:
            return calibrate_on(device, self.folder, subject.path, mode, as_ollama=as_ollama, train_context=subject.override)

        try:
            record, calibration = measured()
        except HarnessError as error:
            if not device.ended():
                raise
            print(f"the device ended, once more: {error.message}", file=sys.stderr)
            record, calibration = measured()
        self.calibrations += 1
        self.worst_own_error = max(self.worst_own_error, calibration.metadata.quality.max_error or 0.0)
        if calibration.metadata.quality.valid_to != subject.train_context:
            raise SystemExit(f"{subject.name}, {mode.name}: {calibration.metadata.quality}")
        return record, calibration

    def model(self, subject: Subject, mode: Mode) -> None:
        """Both policies of the batch, and slots."""
        with (
            Device(self.folder) as device,
            Device(self.folder, resident=True) as resident,
        ):
            record, pinned = self.calibrate(device, subject, mode, as_ollama=False)
            _, automatic = self.calibrate(device, subject, mode, as_ollama=True)
            alone = loaded_at(record, 32768, device.name)
            at_1024 = load_truth(device, subject.path, mode, 32768, num_batch=1024, train_context=subject.override)
            cases = [("pinned", pinned, alone, context, 512, 1) for context in subject.contexts()]
            cases += [("automatic", automatic, at_1024, context, batch_of(context), 1) for context in subject.contexts()]
            cases += [("slots", pinned, alone, SLOT_CONTEXT, 512, slots) for slots in (1, 2, 4)]
            seen: dict[tuple[int, int, int], Truth] = {}
            for case, calibration, reference, context, num_batch, slots in cases:
                predicted = predict(calibration, context, slots).total_bytes
                place = resident if predicted < RESIDENT else device
                truth = seen.get((context, num_batch, slots)) or load_truth(
                    place, subject.path, mode, context,
                    num_batch=num_batch, num_parallel=slots, train_context=subject.override,
                )  # fmt: skip
                seen[context, num_batch, slots] = truth
                self.add(subject, mode, case, context, num_batch, slots, truth, predicted, reference, device.name)

    def software_gpu(self, subject: Subject, mode: Mode) -> None:
        """The batch pinned, on the software Vulkan device."""
        with SoftwareGpu() as device:
            record, pinned = self.calibrate(device, subject, mode, as_ollama=False)
            alone = loaded_at(record, 32768, device.name)
            for context in subject.contexts():
                truth = load_truth(device, subject.path, mode, context, train_context=subject.override)
                predicted = predict(pinned, context).total_bytes
                self.add(subject, mode, "software GPU", context, 512, 1, truth, predicted, alone, device.name)

    def add(
        self,
        subject: Subject,
        mode: Mode,
        case: str,
        context: int,
        num_batch: int,
        slots: int,
        truth: Truth,
        predicted: int,
        reference: Truth,
        device: str,
    ) -> None:
        cells = truth.facts.context_cells or 0
        point = Point(
            model=subject.name,
            mode=mode.name,
            case=case,
            context=context,
            num_batch=num_batch,
            num_parallel=slots,
            truth=truth.logged,
            harness=predicted,
            one_point=one_point(reference.facts, device, reference.logged, cells),
            ollama=ollama_estimate(subject.path, cells),
            beyond_log=None if truth.anonymous is None else truth.anonymous - truth.logged,
        )
        self.points.append(point)
        beyond = "" if point.beyond_log is None else f"  process {point.beyond_log / MIB:+.2f} MiB"
        print(
            f"{subject.name:12} {mode.name:9} {case:12} {context:>6} x {slots} at batch {num_batch:>4}: "
            f"{truth.logged / MIB:9.2f} MiB  harness {point.error('harness'):+.4%}  one point {point.error('one_point'):+.1%}  "
            f"Ollama {point.error('ollama'):+.1%}{beyond}",
            flush=True,
        )


def loaded_at(record: Record, context: int, device: str) -> Truth:
    """The load of a calibration at a context."""
    (facts,) = [
        load.facts
        for load in record.loads
        if load.request.purpose == "point" and load.request.context == context and load.facts is not None
    ]
    return Truth(facts=facts, logged=sum(_sizes(facts, device)), anonymous=None)


def _sizes(facts: LoadFacts, device: str) -> list[int]:
    on_device = facts.devices[device]
    return [
        on_device.weights_bytes or 0,
        on_device.kv_cache_bytes or 0,
        on_device.recurrent_bytes or 0,
        on_device.compute_bytes or 0,
        on_device.output_bytes or 0,
    ]


def worst(points: Iterable[Point], which: str) -> float | None:
    """The error furthest from zero, with its sign."""
    return max((point.error(which) for point in points), key=abs, default=None)


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{100 * value:+.{digits}f} %"


def tables(bench: Bench, seconds: float) -> str:
    """What goes into the page."""
    points = bench.points
    lines = [
        f"{len(points)} predictions at contexts never loaded before, {bench.calibrations} calibrations, "
        f"{seconds / 60:.0f} minutes. Largest error, by case:",
        "",
        "| case | points | allowed | harness | one load at 32,768 | Ollama's estimate |",
        "|---|---|---|---|---|---|",
    ]
    for case, allowed in TARGETS.items():
        those = [point for point in points if point.case == case]
        if those:
            lines.append(
                f"| {case} | {len(those)} | {allowed:.1%} | {_percent(worst(those, 'harness'), 4)} | "
                f"{_percent(worst(those, 'one_point'), 1)} | {_percent(worst(those, 'ollama'), 1)} |"
            )
    lines += ["", "By model, setting and case; each is the largest of its contexts:", ""]
    lines += [
        "| model | setting | case | contexts | harness | one load at 32,768 | Ollama's estimate |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((point.model, point.mode, point.case) for point in points):
        those = [point for point in points if (point.model, point.mode, point.case) == key]
        contexts = ", ".join(dict.fromkeys(f"{point.context:,}" for point in those))
        slots = sorted({point.num_parallel for point in those})
        where = contexts if slots == [1] else f"{contexts} × {', '.join(map(str, slots))} slots"
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {where} | {_percent(worst(those, 'harness'), 4)} | "
            f"{_percent(worst(those, 'one_point'), 1)} | {_percent(worst(those, 'ollama'), 1)} |"
        )
    beyond = [point.beyond_log for point in points if point.beyond_log is not None]
    if beyond:
        furthest = max(abs(one - median(beyond)) for one in beyond)
        lines += [
            "",
            f"The device's own process, at {len(beyond)} of these loads: {median(beyond) / MIB:.2f} MiB of anonymous memory "
            f"more than the log says, at every load within {furthest / MIB:.2f} MiB.",
        ]
    lines.append(f"The largest `max_error` that a calibration claims of itself: {bench.worst_own_error:.4%}.")
    return "\n".join(lines)


def misses(points: Iterable[Point]) -> list[Point]:
    """Points whose error is above its target."""
    return [point for point in points if abs(point.error("harness")) > TARGETS[point.case]]


def write_page(text: str) -> None:
    """Replace what stands between the page's markers."""
    page = PAGE.read_text()
    begin, end = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
    before, rest = page.split(begin, 1)
    _, after = rest.split(end, 1)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> None:
    names = (GEMMA, *MODELS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(names), help="some of: %(default)s")
    parser.add_argument("--modes", default=";".join(mode.name for mode in MODES), help="some of: %(default)s")
    parser.add_argument("--print-only", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    wanted = options.models.split(",")
    modes = [mode for mode in MODES if mode.name in options.modes.split(";")]
    no_software_gpu = rpc.vulkan_obstacle()
    if no_software_gpu is not None:
        print(f"without the software GPU, so the page stays as it is: {no_software_gpu}", file=sys.stderr)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder)
        everything = list(subjects(folder, wanted))
        for subject in everything:
            for mode in modes:
                bench.model(subject, mode)
            shutil.rmtree(folder / "runs", ignore_errors=True)
        for subject in everything:
            if subject.name in SOFTWARE_GPU and MODES[0] in modes and no_software_gpu is None:
                bench.software_gpu(subject, MODES[0])
    text = tables(bench, time.monotonic() - begin)
    print(f"\n{text}")
    if not options.print_only and no_software_gpu is None:
        write_page(text)
    for point in (missed := misses(bench.points)):
        print(f"above its target: {point}", file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
