"""Settings that were not calibrated, and contexts far beyond the loads, against real loads.

    python -m bench.beyond [--only settings|contexts] [--models dense,moe] [--print-only]

On this machine's CPU with the embedded engine, so it runs anywhere; it writes two tables of docs/explanation/verdicts.md. First
the grid of settings: f32, f16, bf16, q8_0 and q4_0 caches, flash attention on and off, 1, 2 and 4 slots, asked of a calibration
of one of them. What is derived is compared with loads of just those settings; what is not derived has to be unknown, nothing
may fit that does not. Then twelve models, calibrated at 2,048 to 8,192 tokens and loaded 4, 8 and 16 times as far: is what they
take inside the prediction interval?
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from bench.models import MODELS as LARGE
from bench.models import llama
from bench.verdict_page import write
from harness.api import calibrate
from harness.errors import EngineError, UntrustedError
from harness.fit.observations import points_of
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.options import FlashAttention
from harness.prediction.memory import predict
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
from harness.serving.check import check
from harness.store.store import Store, read_record
from harness.units import GIB, MIB
from tests.support.synthetic import MODELS as SMALL

NEAR: Final = (2048, 4096, 8192)
FAR: Final = (32_768, 65_536, 131_072)
#: Loads above this are left out: buffers are made resident.
LARGEST: Final = 3 * GIB
CONTEXT: Final = 8192
CACHES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0")
SLOTS: Final = (1, 2, 4)
#: Calibrations that the grid is asked of: cache, flash attention, slots.
ASKED_OF: Final = (("f16", "on", 1), ("q8_0", "on", 2), ("f16", "off", 1), ("f32", "on", 1))
GRID_MODELS: Final = ("dense", "window")
MODES: Final[tuple[tuple[str, FlashAttention], ...]] = (("f16", "on"), ("f32", "on"), ("q8_0", "on"), ("f16", "off"))
DERIVED: Final = 0.005


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the grid: what was said, and what a load took; bytes."""

    model: str
    of: str
    asked: str
    verdict: str
    source: str | None
    required: int | None
    truth: int | None
    false_fit: bool

    @property
    def error(self) -> float | None:
        """Relative error of what was derived."""
        return None if self.truth is None or self.required is None else self.required / self.truth - 1


class Beyond(msgspec.Struct, frozen=True, kw_only=True):
    """One load far from those of its calibration; bytes."""

    model: str
    mode: str
    context: int
    truth: float
    predicted: int
    uncertainty: int

    @property
    def inside(self) -> bool:
        """Whether the truth is inside the interval."""
        return abs(self.predicted - self.truth) <= self.uncertainty


def subject(folder: Path, name: str) -> Path:
    """A model by its name, written where it is not there yet."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        if name in SMALL:
            SMALL[name](path)
        else:
            (llama(2048) if name == "llama-small" else LARGE[name.removesuffix("-large")]()).write(path)
    return path


def names() -> list[str]:
    """Twelve models: five of a few megabytes, seven of up to a gigabyte."""
    return [*SMALL, *(f"{name}-large" for name in LARGE), "llama-small"]


def loads(
    folder: Path, model: Path, contexts: Iterable[int], cache: str, flash: FlashAttention, slots: int
) -> tuple[dict[int, float], Calibration | None]:
    """What loads at some contexts take, bytes, and their calibration where one follows from them."""
    store = Store(folder / f"{model.stem}-{cache}-{flash}-{slots}-{len(list(folder.iterdir()))}")
    calibration = None
    try:
        calibration = calibrate(
            str(model), contexts=tuple(contexts), store=store.root, engine="llama-server", gpus="none", speed=False,
            kv_cache_type=cache, flash_attention=flash, num_parallel=slots, timeout=600,
        ).calibration  # fmt: skip
    except UntrustedError as error:
        say(f"{model.stem} {cache} {flash}: {error.message}")
    record = read_record(next((store.root / "runs").iterdir()))
    return {point.context: point.total for point in points_of(record)[0]}, calibration


def settings(folder: Path, models: Iterable[str]) -> Iterator[Setting]:
    """Ask the grid of calibrations of one setting each."""
    for name in models:
        model = subject(folder, name)
        truths: dict[tuple[str, FlashAttention, int], float | None] = {}
        for cache in CACHES:
            for flash in ("on", "off"):
                for slots in SLOTS:
                    truths[cache, flash, slots] = _truth(folder, model, cache, flash, slots)
        for of in ASKED_OF:
            cache, flash, slots = of
            _, calibration = loads(folder, model, NEAR, cache, flash, slots)  # type: ignore[arg-type]
            if calibration is None:
                raise SystemExit(f"{name} {of}: no calibration")
            store = Store(folder / f"asked-{name}-{'-'.join(map(str, of))}")
            store.write(store.path_of(calibration.engine, name), calibration)
            for asked, truth in truths.items():
                yield _ask(store, calibration, name, " ".join(map(str, of)), asked, truth)


def _truth(folder: Path, model: Path, cache: str, flash: FlashAttention, slots: int) -> float | None:
    """What one load takes; ``None`` where the engine refuses the settings."""
    try:
        return loads(folder, model, (CONTEXT // 2, CONTEXT), cache, flash, slots)[0].get(CONTEXT)
    except EngineError as error:
        say(f"{model.stem} {cache} {flash} {slots}: {error.message}")
        return None


def _ask(
    store: Store, calibration: Calibration, model: str, of: str, asked: tuple[str, FlashAttention, int], truth: float | None
) -> Setting:
    cache, flash, slots = asked
    question = CheckRequest(model=calibration.id, context=CONTEXT, num_parallel=slots)
    wanted = CalibrationFilter(kv_cache_type=cache, flash_attention="enabled" if flash == "on" else "disabled")
    plenty = check([question], store, LocalMachine(), wanted=wanted, available=(1 << 50,))
    details = plenty.models[0].details
    just = (1 << 40) if truth is None else round(truth) - 1
    small = check([question], store, LocalMachine(), wanted=wanted, available=(just,))
    return Setting(
        model=model, of=of, asked=f"{cache} {flash} {slots}", verdict=plenty.verdict,
        source=None if details is None else details.source, required=None if details is None else details.required_bytes,
        truth=None if truth is None else round(truth), false_fit=small.verdict == "fits",
    )  # fmt: skip


def contexts(folder: Path, models: Iterable[str], refused: list[str]) -> Iterator[Beyond]:
    """Load every model far beyond its calibration, with two of the modes each; ``refused`` takes what was not calibrated."""
    for index, name in enumerate(models):
        model = subject(folder, name)
        for cache, flash in (MODES[index % len(MODES)], MODES[(index + 1) % len(MODES)]):
            _, calibration = loads(folder, model, NEAR, cache, flash, 1)
            if calibration is None:  # nothing is said of it, so nothing is wrong
                refused.append(f"{name} ({cache}, FA {flash})")
                continue
            train = calibration.metadata.model.train_context or FAR[-1]
            far = [one for one in FAR if one <= train and predict(calibration, one).total_bytes <= LARGEST]
            measured, _ = loads(folder, model, far, cache, flash, 1) if far else ({}, None)
            for context in far:  # of steep lines there are loads below them, too
                if (truth := measured.get(context)) is None:
                    continue
                said = predict(calibration, context)
                found = Beyond(
                    model=name, mode=f"{cache}, FA {flash}", context=context, truth=truth, predicted=said.total_bytes,
                    uncertainty=said.uncertainty_bytes,
                )  # fmt: skip
                say(f"{found.model} {found.mode} {context}: {truth / MIB:.1f} {found.predicted / MIB:.1f} "
                    f"± {found.uncertainty / MIB:.1f} {'inside' if found.inside else 'OUTSIDE'}")  # fmt: skip
                yield found


def settings_text(found: list[Setting]) -> str:
    """The summary of the grid and a row for each calibration."""
    answered = [one for one in found if one.verdict == "fits" and one.error is not None]
    worst = max((abs(one.error or 0.0) for one in answered), default=0.0)
    lines = [
        f"- {len(found)} questions: {sum(one.false_fit for one in found)} false fits; {len(answered)} answered, off by "
        f"{worst:.3%} at most; {sum(one.verdict == 'unknown' for one in found)} unknown.",
        "",
        "| model | calibrated with | answered (error) | unknown |",
        "|---|---|---|---|",
    ]
    for model, of in dict.fromkeys((one.model, one.of) for one in found):
        mine = [one for one in found if (one.model, one.of) == (model, of)]
        fits = ", ".join(f"{one.asked} ({one.error:+.3%})" for one in mine if one.verdict == "fits" and one.error is not None)
        unknown = ", ".join(one.asked for one in mine if one.verdict == "unknown")
        lines.append(f"| {model} | {of} | {fits} | {unknown} |")
    return "\n".join(lines)


def contexts_text(found: list[Beyond], refused: list[str]) -> str:
    """The summary of the contexts and a row for each model and mode."""
    inside = sum(one.inside for one in found)
    errors = sorted(abs(one.predicted / one.truth - 1) for one in found)
    lines = [
        f"- {len(found)} loads of {len({one.model for one in found})} models, 4 to 16 times beyond the largest load: {inside} "
        f"inside the interval ({inside / max(len(found), 1):.1%}); error {errors[len(errors) // 2]:.3%} in the median, "
        f"{errors[-1]:.3%} at most.",
        *([f"- Refused, since loads were not on a line (exit 5): {', '.join(refused)}."] if refused else []),
        "",
        "| model | cache, flash attention | contexts | error, worst | interval, widest | outside |",
        "|---|---|---|---|---|---|",
    ]
    for model, mode in dict.fromkeys((one.model, one.mode) for one in found):
        mine = [one for one in found if (one.model, one.mode) == (model, mode)]
        worst = max((one.predicted / one.truth - 1 for one in mine), key=abs)
        width = max(one.uncertainty / one.truth for one in mine)
        at = ", ".join(f"{one.context:,}" for one in mine)
        lines.append(f"| {model} | {mode} | {at} | {worst:+.3%} | ± {width:.2%} | {sum(not one.inside for one in mine)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("settings", "contexts"))
    parser.add_argument("--models", help="those that are loaded far from their calibration; all by default")
    parser.add_argument("--print-only", action="store_true", help="do not write the page")
    options = parser.parse_args()
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="harness-beyond-") as scratch:
        folder = Path(scratch)
        if options.only != "contexts":
            grid = list(settings(folder, GRID_MODELS))
            text = settings_text(grid)
            print(text)
            missed += [f"false fit: {one}" for one in grid if one.false_fit]
            missed += [f"off: {one}" for one in grid if one.verdict == "fits" and abs(one.error or 1.0) > DERIVED]
            if not options.print_only:
                write("settings", text)
        if options.only != "settings":
            refused: list[str] = []
            far = list(contexts(folder, options.models.split(",") if options.models else names(), refused))
            text = contexts_text(far, refused)
            print(text)
            if sum(one.inside for one in far) < 0.99 * len(far):
                missed += [f"outside: {one}" for one in far if not one.inside]
            if not options.print_only:
                write("contexts", text)
    for miss in missed:
        say(f"MISSED: {miss}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
