"""A header against the weights: calibrations of both, and estimates against loads; writes docs/explanation/estimates.md.

    make bench-header [ARGS="--models gemma3-270m,qwen2 --no-calibrations"]

Calibrations: eight models with random weights (one real, five architectures, a small one, one split into three files), each
measured from its weights and from its header alone by the embedded engine on host memory. Estimates: seven models of up to a
gigabyte at five contexts, with three settings; the truth is what a load that allocates everything logs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from bench.models import MODELS
from harness.engines.base import Options
from harness.engines.gguf import Header, read_header, server_estimate
from harness.engines.llama_server.embedded import embedded_build
from harness.engines.registry import EMBEDDED, recipe_of
from harness.engines.shape import shape_of
from harness.headers.planning import Planner
from harness.logs import parse_log
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration
from harness.model.planned import PlannedLoad, Shape
from harness.model.record import LoadRequest
from harness.options import RunOptions
from harness.prediction.estimate import DRY_RUN_DOUBT
from harness.prediction.formula import CACHE_DOUBT, COMPUTE_DOUBT, UNKNOWN_DOUBT, WEIGHTS_DOUBT, plan_by_formula
from harness.sandboxes.environment import clean_environment
from harness.store.catalog import find_catalog, gguf_path, read_catalog
from harness.store.store import Store
from harness.units import GIB, MIB, from_gib
from tests.support import models as small
from tests.support import synthetic

PAGE: Final = Path(__file__).parents[1] / "docs" / "explanation" / "estimates.md"
MARK: Final = "<!-- make bench-header writes what follows -->\n"
CONTEXTS: Final = (2048, 8192, 16_384, 32_768, 65_536)
#: Cache type and flash attention; a quantised cache needs it.
MODES: Final = (("f16", "on"), ("q8_0", "on"), ("f16", "off"))
REAL: Final = "gemma3-270m"
_LONGEST: Final = 120.0
#: Slopes of the meter are exact to pages: 0.01 MiB at 10,000 tokens.
_LAST_DIGIT: Final = 1e-5


class Both(msgspec.Struct, frozen=True, kw_only=True):
    """One model, calibrated twice."""

    model: str
    weights: Calibration
    header: Calibration
    header_bytes: int
    file_bytes: int

    @property
    def off(self) -> float:
        """The difference of the bases, bytes."""
        return abs(from_gib(self.weights.constants.base_vram_gb) - from_gib(self.header.constants.base_vram_gb))

    @property
    def slopes_equal(self) -> bool:
        """Whether caches and compute grow alike."""
        one, other = self.weights.constants, self.header.constants
        kv = abs(one.kv_cache_gb_per_10k - other.kv_cache_gb_per_10k)
        return max(kv, abs(one.compute_gb_per_10k - other.compute_gb_per_10k)) < _LAST_DIGIT

    @property
    def holds(self) -> bool:
        """Within 0.1 MiB or 0.01 %, with equal slopes; the meter itself counts pages of 4 KiB."""
        base = from_gib(self.weights.constants.base_vram_gb)
        return self.slopes_equal and self.off <= max(0.1 * MIB, 1e-4 * base)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One load: bytes that it logged, and what each method says of it."""

    model: str
    mode: str
    context: int
    truth: int
    said: dict[str, int]
    bound: int


def real_model() -> Path:
    """The embedded model."""
    catalog = read_catalog(find_catalog(Path.cwd()))
    return gguf_path("gemma3:270m", catalog.models["gemma3:270m"])


def weighted(folder: Path) -> Iterator[tuple[str, Path]]:
    """Models with weights that are not zeros."""
    yield REAL, real_model()
    for name, write in synthetic.MODELS.items():
        path = folder / f"{name}.gguf"
        write(path)
        yield name, path
    yield "tiny", small.write_tiny_llama(folder / "tiny.gguf")
    gguf: Any = importlib.import_module("gguf")
    whole = gguf.GGUFWriter
    gguf.GGUFWriter = partial(whole, split_max_tensors=20)
    try:
        synthetic.dense(folder / "split.gguf")
    finally:
        gguf.GGUFWriter = whole
    yield "split", next(iter(sorted(folder.glob("split-00001-of-*.gguf"))))


def calibrated_twice(name: str, path: Path, folder: Path) -> Both:
    """From the weights, and from the header."""
    found = []
    for header_only in (False, True):
        asked = RunOptions(
            model=str(path), engine=EMBEDDED, gpus="none", contexts=(4096, 8192, 16_384), speed=False, header_only=header_only
        )  # fmt: skip
        found.append(prepare(asked, Store(folder / f"store-{header_only}"), folder).calibrate(Observer()).calibration)
    parts = sorted(path.parent.glob("split-*.gguf")) if name == "split" else [path]
    return Both(
        model=name, weights=found[0], header=found[1], file_bytes=sum(part.stat().st_size for part in parts),
        header_bytes=sum(read_header(part).begin for part in parts),
    )  # fmt: skip


def loaded(path: Path, context: int, options: Options) -> int | None:
    """What a load logs that allocates everything: weights, caches, compute buffers; bytes."""
    launch = recipe_of(EMBEDDED).planning(path, LoadRequest(context=context, num_batch=512), options)
    if launch is None:
        raise SystemExit("the embedded engine does not run here")
    # Weights are mapped: their size is logged alike, and nothing of them is read.
    argv = [{"none": "mmap"}.get(word, word) for word in launch.argv if word != "--no-alloc"]
    argv[argv.index("-dev") + 1] = "none"
    env = clean_environment(os.environ) | launch.env
    with tempfile.TemporaryFile() as log, subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT) as process:
        begin = time.monotonic()
        while time.monotonic() - begin < _LONGEST and process.poll() is None:
            log.seek(0)
            if b"reserve took" in log.read():
                break
            time.sleep(0.05)
        process.kill()
        process.wait()
        log.seek(0)
        loads = parse_log(log.read())
    if not loads or loads[-1].estimated or loads[-1].total("compute_bytes") is None:
        return None
    parts = ("weights_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes", "output_bytes")
    return sum(loads[-1].total(part) or 0 for part in parts)


def total(planned: PlannedLoad, weights: int) -> int:
    """All parts of a load on the host."""
    caches = sum(cache.total_bytes for cache in planned.caches)
    return weights + caches + planned.recurrent_bytes + planned.compute_bytes + planned.output_bytes


def formula_bound(planned: PlannedLoad, shape: Shape) -> int:
    """How far the formula may be off, by its own account."""
    caches = sum(cache.total_bytes for cache in planned.caches)
    doubt = (CACHE_DOUBT if shape.known else UNKNOWN_DOUBT) * caches
    return round(WEIGHTS_DOUBT * shape.weights_bytes + COMPUTE_DOUBT * planned.compute_bytes + doubt)


def ollama(header: Header, size: int, context: int) -> int:
    """Ollama >= 0.30, ``PredictServerVRAM``: the file, and F16 keys and values in every layer."""
    found = server_estimate(header, size)
    return 0 if found is None else found.file_bytes + found.cache_bytes_per_token * context


def by_header(shape: Shape, context: int, kind: str) -> int:
    """As gguf-parser counts: weights, caches with their windows, logits of a whole batch; no state, no masks."""
    planned = plan_by_formula(shape, context, 512, 1, kind, "enabled")
    return shape.weights_bytes + sum(cache.total_bytes for cache in planned.caches) + shape.vocabulary * 512 * 4


def rivals(header: Header, shape: Shape, size: int, context: int, kind: str) -> dict[str, int]:
    """What rules of other programs say."""
    return {
        "Ollama, before a load": ollama(header, size, context),
        "weights, caches and logits": by_header(shape, context, kind),
        "weights × 1.2 + 2 GiB": round(1.2 * shape.weights_bytes + 2 * GIB),
    }


DRY, FORMULA = "harness, dry run", "harness, formula"


def cases(name: str, path: Path) -> Iterator[Case]:
    """Every context and setting of a model."""
    header, size = read_header(path), path.stat().st_size
    shape = shape_of(header)
    if shape is None:
        raise SystemExit(f"{name} has no shape")
    for kind, flash in MODES:
        options = Options(kv_cache_type=kind, flash_attention="on" if flash == "on" else "off")
        planner = Planner(path, f"{path}:{size}", options)
        for context in (one for one in CONTEXTS if one <= shape.train_context):
            truth = loaded(path, context, options)
            planned = planner.plan(LoadRequest(context=context, num_batch=512))
            if truth is None or planned is None:
                print(f"{name} {kind} {flash} {context}: no load", file=sys.stderr)
                continue
            by_formula = plan_by_formula(shape, context, 512, 1, kind, "enabled" if flash == "on" else "disabled")
            said = {DRY: total(planned, shape.weights_bytes), FORMULA: total(by_formula, shape.weights_bytes)}
            said |= rivals(header, shape, size, context, kind)
            mode = f"{kind}, flash attention {flash}"
            yield Case(model=name, mode=mode, context=context, truth=truth, said=said, bound=formula_bound(by_formula, shape))


def scoreboard(found: Sequence[Case]) -> str:
    """Each method over all loads."""
    lines = ["| method | median error | largest error | largest under-estimate | where |", "| --- | --- | --- | --- | --- |"]
    for method in found[0].said:
        errors = [(one.said[method] / one.truth - 1, one) for one in found]
        low, worst = min(errors, key=lambda pair: pair[0])
        where = f"{worst.model}, {worst.mode}, {worst.context:,}"
        sizes = [abs(error) for error, _ in errors]
        under = f"{100 * -low:.1f} %" if low < 0 else "none"
        lines.append(f"| {method} | {median(sizes):.2%} | {max(sizes):.1%} | {under} | {where if low < 0 else ''} |")
    return "\n".join(lines).replace("%|", "% |")


def by_mode(found: Sequence[Case]) -> str:
    """The largest error of each method, by setting."""
    methods = list(found[0].said)
    lines = ["| setting | " + " | ".join(methods) + " |", "| --- " * (len(methods) + 1) + "|"]
    for mode in dict.fromkeys(one.mode for one in found):
        some = [one for one in found if one.mode == mode]
        worst = [max((one.said[method] / one.truth - 1 for one in some), key=abs) for method in methods]
        lines.append(f"| {mode} | " + " | ".join(f"{error:+.1%}" for error in worst) + " |")
    return "\n".join(lines)


def twice(found: Sequence[Both]) -> str:
    """Both calibrations of each model."""
    lines = [
        "| model | file | of it read | base from the weights | base from the header | differ by | slopes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        first, second = one.weights.constants.base_vram_gb, one.header.constants.base_vram_gb
        off = f"{one.off / MIB:.3f} MiB" + ("" if one.holds else " (more than 0.1 MiB and 0.01 %)")
        sizes = f"{one.file_bytes / 1e6:.1f} MB | {one.header_bytes / 1e6:.2f} MB"
        equal = "equal" if one.slopes_equal else "not equal"
        lines.append(f"| {one.model} | {sizes} | {first:.6f} GiB | {second:.6f} GiB | {off} | {equal} |")
    return "\n".join(lines)


def report(pairs: Sequence[Both], found: Sequence[Case]) -> str:
    """What is written into the page."""
    parts = [f"llama.cpp {embedded_build()}, the embedded engine, on host memory.\n"]
    if pairs:
        held = sum(one.holds for one in pairs)
        parts += ["## A header against the weights\n", twice(pairs), f"\n{held} of {len(pairs)} within 0.1 MiB or 0.01 %.\n"]
    if found:
        within = sum(abs(one.said[FORMULA] - one.truth) <= one.bound for one in found)
        dry = max(abs(one.said[DRY] / one.truth - 1) for one in found)
        parts += [
            "## Estimates against loads\n", scoreboard(found),
            f"\n{len(found)} loads. The dry run is within {dry:.2%} of each (its bound is {DRY_RUN_DOUBT:.0%}); the formula is "
            f"within its own bound at {within} of them. The largest error of each, by setting:\n", by_mode(found), "",
        ]  # fmt: skip
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join((REAL, *MODELS)))
    parser.add_argument("--no-calibrations", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="harness-header-") as name:
        folder = Path(name)
        os.environ["HARNESS_CACHE"] = os.environ.get("HARNESS_CACHE", str(real_model().parent))
        pairs = []
        if not options.no_calibrations:
            for model, path in weighted(folder):
                pairs.append(calibrated_twice(model, path, folder))
                print(twice(pairs[-1:]).splitlines()[-1], flush=True)
        found: list[Case] = []
        for model in filter(None, options.models.split(",")):
            path = real_model() if model == REAL else MODELS[model]().write(folder / f"{model}.bench.gguf")
            found += cases(model, path)
            print(f"{model}: {len(found)} loads", flush=True)
    text = report(pairs, found)
    print(text)
    if pairs and found:
        PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "\n" + text)
    return 0 if all(one.holds for one in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
