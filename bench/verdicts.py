"""Verdicts against what the engine then does; the tables of docs/explanation/verdicts.md.

    make bench-verdicts [ARGS="--models qwen2,lfm2 --devices RPC0 --print-only"]

Six models are calibrated at contexts up to 4,096, as F16 and as q8_0 caches, on this machine's CPU behind ggml-rpc-server and
on Mesa's software GPU. Then they are judged at contexts of 8,192 to 131,072 on cards of many sizes, acted out by llama-server's
``--fit-target``, and the real llama-server decides the same. It is ended when it has decided; a few of the cards are loaded
whole. Beside harness stands the estimate of Ollama >= 0.30 (``PredictServerVRAM``) on the same cards. Last, decode speed with
a part of the layers on the (slow) software GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec

from bench.fitting import RESERVE, Assessment, DeviceGoneError, calibrate, command, engine_fit, environment, judge_cards
from bench.models import MODELS
from bench.verdict_page import write
from harness.errors import EngineError, UntrustedError
from harness.logs import parse_log
from harness.model.calibration import Calibration
from harness.store.catalog import gguf_path, read_catalog
from harness.units import MIB
from tests.support.f16 import rpc_weights
from tests.support.rules import judge, place
from tests.support.truth import Device, SoftwareGpu, free_port

CONTEXTS: Final = (8192, 32768, 131072)
SHARES: Final = (1.03, 1.011, 1.002, 0.998, 0.989, 0.93, 0.8, 0.6, 0.4, 0.2)
#: Of these cards, one a model is loaded whole.
LOADED: Final = (8192, 0.6)
#: Shares of the layers that are to stay.
SPLITS: Final = (0.9, 0.7, 0.5, 0.35, 0.2)
SPEED_CONTEXT: Final = 4096
REPEATS: Final = 3
TOKENS: Final = 64


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """One card loaded whole: layers on the GPU and layers that overflow, as they came to lie and as predicted."""

    layers: tuple[int | None, int]
    predicted: tuple[int | None, int | None]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one device with one type of cache."""

    device: str
    model: str
    kv_cache_type: str
    cards: list[Assessment]
    loaded: Loaded | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.device, self.model, self.kv_cache_type

    def row(self) -> str:
        """Its line of the table."""
        cards = self.cards
        far = [card for card in cards if not card.near_edge]
        off = [card.layers_off for card in cards if card.layers_off is not None]
        shares = [
            abs(card.placed.host_share - card.truth.host_share) for card in cards if card.placed and card.layers_off is not None
        ]
        cells = [
            self.device, self.model, self.kv_cache_type, len(cards),
            sum(card.false_fit for card in far), sum(card.false_offload for card in far),
            sum(card.false_fit or card.false_offload for card in cards if card.near_edge),
            f"{sum(one == 0 for one in off)} / {sum(one <= 1 for one in off)} / {len(off)}",
            max(off, default=0), f"{max(shares, default=0):.1%}",
            sum(card.estimate <= card.budget * MIB and not card.truth.full for card in far),
            sum(card.estimate > card.budget * MIB and card.truth.full for card in far),
        ]  # fmt: skip
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEAD: Final = (
    "| device | model | cache | cards | false fits | false offloads | wrong within 1 % of the edge "
    "| layers exact / ±1 / of | layers off, worst | host share off, worst | Ollama: false fits | Ollama: false offloads |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def grid(
    folder: Path, devices: Sequence[str], models: Sequence[str], contexts: Sequence[int], shares: Sequence[float]
) -> Iterator[Case]:
    """Calibrate, judge, and have the engine decide."""
    for name in devices:
        for model in models:
            path = folder / f"{model}.gguf"
            if not path.exists():
                MODELS[model]().write(path)
            for kv_cache_type in ("f16", "q8_0"):
                try:
                    yield one_case(folder, name, path, kv_cache_type, contexts, shares)
                except UntrustedError as error:  # it is larger than the device, so there is nothing to go by
                    say(f"{name} {model} {kv_cache_type}: left out, {error}")
                except (DeviceGoneError, EngineError) as error:  # ggml-rpc-server dies of some layouts: a new one, once
                    say(f"{name} {model} {kv_cache_type}: again, {error}")
                    yield one_case(folder, name, path, kv_cache_type, contexts, shares)


def one_case(
    folder: Path, name: str, model: Path, kv_cache_type: str, contexts: Sequence[int], shares: Sequence[float]
) -> Case:
    """Calibrate on a device that is started for it, judge, and have the engine decide."""
    with open_device(name, folder) as device:
        began = time.monotonic()
        calibration = calibrate(device, folder / name / kv_cache_type, model, kv_cache_type)
        calibrated = time.monotonic()
        cards = judge_cards(device, model, kv_cache_type, calibration, contexts, shares)
        say(f"{name} {model.stem} {kv_cache_type}: {calibrated - began:.0f} s + {time.monotonic() - calibrated:.0f} s")
        for card in cards:
            if card.layers_off or card.false_fit or card.false_offload:
                say(f"  {card.context} at {card.budget} MiB: {card.truth} {card.placed}")
        loaded = check_load(device, model, calibration) if kv_cache_type == "f16" else None
        say(f"  {loaded}")
    return Case(device=name, model=model.stem, kv_cache_type=kv_cache_type, cards=cards, loaded=loaded)


@contextmanager
def open_device(name: str, folder: Path) -> Iterator[Device]:
    """A device by its name in llama.cpp."""
    with SoftwareGpu() if name.startswith("Vulkan") else Device(folder) as device:
        yield device


def check_load(device: Device, model: Path, calibration: Calibration) -> Loaded:
    """Load one card whole."""
    context, share = LOADED
    budget = round((judge(calibration, context, 1, (1 << 50,)).required_bytes or 0) * share / MIB)
    verdict = judge(calibration, context, 1, (budget * MIB + RESERVE,))
    target = engine_fit(device, model, "f16", context, 0).free - budget
    with serving(device, model, context, target) as (_, log):
        facts = next(one for one in parse_log(log.read_bytes()) if one.complete)
    return Loaded(
        layers=(facts.layers_offloaded, facts.layers_overflowing or 0),
        predicted=(verdict.layers_offloaded, verdict.layers_overflowing),
    )


@contextmanager
def serving(device: Device, model: Path, context: int, target: int) -> Iterator[tuple[httpx.Client, Path]]:
    """A llama-server that is ready, and its log."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "engine.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command(device, model, "f16", context, target, port=port),
                env=environment(device), stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=600) as client:
                while not _ready(client):
                    if process.poll() is not None:
                        raise SystemExit(log.read_text(errors="replace")[-2000:])
                    time.sleep(0.1)
                yield client, log
        finally:
            process.kill()
            process.wait(60)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def decode_speed(client: httpx.Client) -> float:
    """Tokens per second over :data:`TOKENS` tokens after a short prompt."""
    body = {"prompt": list(range(100, 116)), "n_predict": TOKENS, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    timings = client.post("/completion", json=body).raise_for_status().json()["timings"]
    return float(timings["predicted_n"] * 1000 / timings["predicted_ms"])


def speed(folder: Path, name: str) -> Iterator[str]:
    """Rows of the second table: one model, five splits, three interleaved repeats."""
    catalog = read_catalog(Path(__file__).parents[1] / "models" / "catalog.yaml")
    model = rpc_weights(gguf_path("gemma3:270m", catalog.models["gemma3:270m"]))
    with open_device(name, folder) as device:
        calibration = calibrate(device, folder / "speed", model, "f16", speed=True)
        performance = calibration.metadata.performance
        say(f"speed: {performance}")
        need = judge(calibration, SPEED_CONTEXT, 1, (1 << 50,)).required_bytes or 0
        free = engine_fit(device, model, "f16", SPEED_CONTEXT, 0).free
        layers = (calibration.metadata.model.layers or 0) + 1
        kept = {budget: _layers(calibration, budget) for budget in range(1, need // MIB + 1)}
        budgets = [next(budget for budget in kept if kept[budget] >= share * layers) for share in SPLITS]
        measured: dict[int, list[float]] = {budget: [] for budget in budgets}
        placed: dict[int, int] = {}
        for _ in range(REPEATS):
            for budget in budgets:
                with serving(device, model, SPEED_CONTEXT, free - budget) as (client, log):
                    measured[budget].append(decode_speed(client))
                    facts = next(one for one in parse_log(log.read_bytes()) if one.complete)
                    placed[budget] = facts.layers_offloaded or 0
        for budget in budgets:
            verdict = judge(calibration, SPEED_CONTEXT, 1, (budget * MIB + RESERVE,))
            rates, predicted = measured[budget], verdict.decode_tokens_per_s or 0.0
            middle = median(rates)
            spread, error = (max(rates) - min(rates)) / middle, predicted / middle - 1
            held = "yes" if abs(error) <= max(0.15, 2 * spread) else "NO"
            yield (
                f"| {name} | {budget} MiB | {placed[budget]} | {verdict.layers_offloaded} | {middle:.2f} | {spread:.1%} "
                f"| {predicted:.2f} | {error:+.1%} | {held} |"
            )


SPEED_HEAD: Final = (
    "| device | card less reserve | layers | predicted | tokens/s | spread | predicted | error "
    "| within max(15 %, 2 x spread) |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def _layers(calibration: Calibration, budget: int) -> int:
    placed = place(calibration, SPEED_CONTEXT, 1, budget * MIB, None)
    return placed.offloaded if placed else 0


def summary(cases: Sequence[Case]) -> str:
    """What the targets are about."""
    cards = [card for case in cases for card in case.cards]
    far = [card for card in cards if not card.near_edge]
    off = [card.layers_off for card in cards if card.layers_off is not None]
    loaded = [case.loaded for case in cases if case.loaded is not None]
    moe = [card for card in cards if card.placed and card.truth.overflowing]
    foreseen = sum(bool(card.placed and card.placed.overflowing) for card in moe)
    shares = [abs(card.placed.host_share - card.truth.host_share) for card in moe if card.placed]
    return "\n".join(
        [
            f"- {len(cards)} cards, {len(far)} of them more than 1 % from the edge: "
            f"{sum(card.false_fit for card in far)} false fits, {sum(card.false_offload for card in far)} false offloads.",
            f"- {len(off)} cards with an offload: layers exact on {sum(one == 0 for one in off) / len(off):.1%}, "
            f"within 1 on {sum(one <= 1 for one in off) / len(off):.1%}, worst {max(off)}.",
            f"- {len(moe)} cards on which experts overflow: foreseen on {foreseen}, share of weights on the host off by "
            f"at most {max(shares, default=0):.1%}.",
            f"- {len(loaded)} cards loaded whole: layers and overflow as predicted on "
            f"{sum(one.layers == one.predicted for one in loaded)}.",
            f"- Ollama's estimate on the {len(far)} cards: "
            f"{sum(card.estimate <= card.budget * MIB and not card.truth.full for card in far)} false fits, "
            f"{sum(card.estimate > card.budget * MIB and card.truth.full for card in far)} false offloads.",
        ]
    )


def failures(cases: Sequence[Case]) -> list[str]:
    """Targets that were missed."""
    cards = [card for case in cases for card in case.cards]
    off = [card.layers_off for card in cards if card.layers_off is not None]
    missed = []
    if any((card.false_fit or card.false_offload) and not card.near_edge for card in cards):
        missed.append("a false verdict more than 1 % from the edge")
    if max(off, default=0) > 2 or sum(one <= 1 for one in off) < 0.9 * len(off):
        missed.append("layers are off by more than 1 in 10 %, or by more than 2")
    for card in cards:
        if not card.truth.overflowing or card.placed is None:
            continue
        if not card.placed.overflowing or abs(card.placed.host_share - card.truth.host_share) > 0.1:
            missed.append(f"experts at {card.context}, {card.budget} MiB: {card.truth} {card.placed}")
    return missed


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default="RPC0,Vulkan0")
    parser.add_argument("--speed-device", default="Vulkan0")
    parser.add_argument("--only", choices=("grid", "speed"))
    parser.add_argument("--cases", type=Path, help="a file that keeps the cases of earlier runs, and takes these")
    parser.add_argument("--print-only", action="store_true", help="do not write the page")
    options = parser.parse_args()
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="harness-verdicts-") as folder:
        if options.only != "speed":
            kept = {}
            if options.cases is not None and options.cases.exists():
                kept = {case.key: case for case in msgspec.json.decode(options.cases.read_bytes(), type=list[Case])}
            for case in grid(Path(folder), options.devices.split(","), options.models.split(","), CONTEXTS, SHARES):
                kept[case.key] = case
                if options.cases is not None:
                    options.cases.write_bytes(msgspec.json.encode(list(kept.values())))
            cases = sorted(kept.values(), key=lambda case: case.key)
            text = "\n".join([summary(cases), "", HEAD, *(case.row() for case in cases)])
            print(text)
            missed += failures(cases)
            if not options.print_only:
                write("verdicts", text)
        if options.only != "grid":
            rows = list(speed(Path(folder), options.speed_device))
            text = "\n".join([SPEED_HEAD, *rows])
            print(text)
            missed += [f"speed: {row}" for row in rows if "| NO |" in row]
            if not options.print_only:
                write("speed", text)
    for miss in missed:
        say(f"MISSED: {miss}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
