"""What llama-server does with a model on a card of some size, without loading its weights.

A card is acted out by ``--fit-target``: the engine may use what is free less the target. It prints where it puts the layers
before it loads them (common/fit.cpp), and is ended then: half a second to three a point.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.gguf import read_header, server_estimate
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration
from harness.options import RunOptions
from harness.prediction.placement import Placed
from harness.prediction.verdict import Verdict
from harness.store.store import Store
from harness.units import MIB
from tests.support.rules import judge, place
from tests.support.truth import PROGRAMS, Device, free_port

RESERVE: Final = 1024 * MIB
#: Contexts of a calibration; everything judged lies beyond them.
NEAR: Final = (1024, 2048, 4096)
#: The last line of a fit, and of it alone (common/fit.cpp).
DONE: Final = "common_fit_params: "
_ROW: Final = re.compile(r"\|\s+- (\w+) \([^|]*\|\s*\d+ =\s*\d+ \+ \(\s*(\d+) =\s*(\d+) \+")
_PROJECTED: Final = re.compile(r"projected to use (\d+) MiB of device memory vs. (\d+) MiB")
_PLACED: Final = re.compile(r"- \w+ \(.*:\s*(\d+) layers(?: \(\s*(\d+) overflowing\))?,\s*(\d+) MiB used")


class DeviceGoneError(Exception):
    """The engine finds no such device, or cannot reach it."""


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine decided; MiB as it prints them. ``overflowing`` is ``None`` where it does not say."""

    projected: int
    free: int
    full: bool
    layers: int | None = None
    overflowing: int | None = None
    host_share: float = 0.0


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """One card: what the engine did, what harness said, what Ollama's estimate says; ``budget`` in MiB."""

    context: int
    budget: int
    truth: Fitted
    verdict: Verdict
    placed: Placed | None
    estimate: int

    @property
    def near_edge(self) -> bool:
        """Within one percent of where the model just fits."""
        return abs(self.budget - self.truth.projected) <= 0.01 * self.truth.projected

    @property
    def false_fit(self) -> bool:
        """Harness said that it fits, and it did not."""
        return self.verdict.verdict == "fits" and not self.truth.full

    @property
    def false_offload(self) -> bool:
        """Harness said that it does not fit, and it did; that it may or may not (*tight*) is true of both."""
        return self.verdict.verdict != "fits" and not self.verdict.tight and self.truth.full

    @property
    def layers_off(self) -> int | None:
        """How many layers the verdict is off; of experts that overflow, too. ``None`` where nothing spilled."""
        if self.truth.full or self.placed is None or self.truth.layers is None:
            return None
        return abs(self.placed.offloaded - self.truth.layers)


def command(
    device: Device, model: Path, kv_cache_type: str, context: int, target: int, *, port: int | None = None
) -> list[str]:
    """llama-server's command line for a card on which ``target`` MiB stay free."""
    return [
        str(PROGRAMS / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port or free_port()),
        "-c", str(context), "-np", "1", "-b", "2048", "-ub", "512", "-fa", "on", "-ctk", kv_cache_type, "-ctv", kv_cache_type,
        *device.options, "-dev", device.name, "-fit", "on", "--fit-target", str(target),
        "--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps",
    ]  # fmt: skip


def environment(device: Device) -> dict[str, str]:
    """The engine's environment."""
    return {**os.environ, "LD_LIBRARY_PATH": str(PROGRAMS), **device.env}


def engine_fit(device: Device, model: Path, kv_cache_type: str, context: int, target: int) -> Fitted:
    """Have the engine decide, and end it before it loads; a device that still clears up after the last one is asked again."""
    for _ in range(20):
        text = "".join(decision(command(device, model, kv_cache_type, context, target), environment(device)))
        if "Failed to connect" not in text:
            break
        time.sleep(0.25)
    if "invalid device" in text:
        raise DeviceGoneError(device.name)
    return read_fit(text)


def decision(command: Sequence[str | Path], env: Mapping[str, str]) -> list[str]:
    """Lines of an engine's log up to the end of its fit; it is ended before it loads weights."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: list[str] = []
    try:
        for line in process.stdout or ():
            lines.append(line)
            if DONE in line:
                break
    finally:
        process.kill()
        process.communicate(timeout=60)
    return lines


def read_fit(text: str) -> Fitted:
    """The decision in a log."""
    projected = _PROJECTED.search(text)
    rows = [(int(row[2]), int(row[3])) for row in _ROW.finditer(text)]
    if projected is None or not rows:
        raise SystemExit(f"no projection: {text[-600:]}")
    found = Fitted(projected=int(projected[1]), free=int(projected[2]), full="no changes needed" in text)
    if found.full:
        return found
    placed = list(_PLACED.finditer(text))[-1]
    weights = next(model for used, model in reversed(rows) if used == int(placed[3]))
    return msgspec.structs.replace(
        found,
        layers=int(placed[1]),
        overflowing=int(placed[2]) if placed[2] else None,
        host_share=1 - weights / rows[0][1],
    )


def calibrate(
    device: Device,
    folder: Path,
    model: Path,
    kv_cache_type: str,
    *,
    contexts: tuple[int, ...] = NEAR,
    speed: bool = False,
) -> Calibration:
    """Calibrate at small contexts only, as ``harness calibrate --ctx 1024,2048,4096`` does."""
    env = {key: value for key, value in device.asked().items() if key != "LLAMA_ARG_FIT"}
    asked = RunOptions(
        model=str(model), engine="llama-server", contexts=contexts, kv_cache_type=kv_cache_type, flash_attention="on",
        gpus=device.name, engine_binary=str(PROGRAMS / "llama-server"), env=env, speed=speed, force=True,
    )  # fmt: skip
    return prepare(asked, Store(folder), folder).calibrate(Observer()).calibration


def judge_cards(
    device: Device, model: Path, kv_cache_type: str, calibration: Calibration, contexts: Sequence[int], shares: Sequence[float]
) -> list[Assessment]:
    """Every context on cards that have ``shares`` of what it needs, as far as the device can act them out."""
    header = read_header(model)
    reckoned = server_estimate(header, model.stat().st_size)
    if reckoned is None:
        raise SystemExit(f"{model} does not say its shape")
    judged = []
    for context in contexts:
        need = judge(calibration, context, 1, (1 << 50,)).required_bytes or 0
        free = engine_fit(device, model, kv_cache_type, context, 0).free
        for share in shares:
            budget = round(need * share / MIB)
            if budget > free:
                continue
            available = budget * MIB + RESERVE
            judged.append(
                Assessment(
                    context=context,
                    budget=budget,
                    truth=engine_fit(device, model, kv_cache_type, context, free - budget),
                    verdict=judge(calibration, context, 1, (available,)),
                    placed=place(calibration, context, 1, budget * MIB, None),
                    estimate=reckoned.file_bytes + reckoned.cache_bytes_per_token * context,
                )
            )
    return judged
