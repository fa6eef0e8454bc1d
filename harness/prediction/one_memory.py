"""One device or host memory: whether a model stays there, and which of its layers do if it does not all."""

from __future__ import annotations

from typing import NamedTuple

from harness.model.calibration import Calibration
from harness.prediction.memory import Prediction, predict
from harness.prediction.placement import Placed, Placer
from harness.prediction.rules import Rules


class Outlook(NamedTuple):
    """What the engine does with a model in one memory, bytes; ``layers`` are offloaded and overflowing (``None``: unknown)."""

    needed: Prediction
    reserve: int
    spills: bool
    tight: bool
    layers_total: int | None
    layers: tuple[int | None, int | None]
    placed: Placed | None
    decode: float | None


class OneMemory:
    """A calibrated model at a context, and one memory for it; asked for any amount that is free there."""

    def __init__(self, calibration: Calibration, context: int, num_parallel: int, rules: Rules) -> None:
        self.calibration, self.context, self.num_parallel, self.rules = calibration, context, num_parallel, rules
        self._rule = rules.placement(calibration)
        self._on_host = calibration.metadata.machine.target == "host"
        self._needed: dict[int | None, Prediction] = {}
        self._placers: dict[int | None, Placer] = {}

    def needed(self, free: int) -> Prediction:
        """Memory in the batch that the engine takes."""
        batch = self.batch(free)
        if batch not in self._needed:
            self._needed[batch] = predict(self.calibration, self.context, self.num_parallel, num_batch=batch)
        return self._needed[batch]

    def batch(self, free: int) -> int | None:
        """The batch that the engine takes, where it chooses one."""
        return self.rules.batch(self.calibration, self.context, self.num_parallel, free)

    def reserve(self, needed: Prediction) -> int:
        """What the engine keeps free beside it."""
        return self._rule.reserve_of(needed.overhead_bytes)

    def fits(self, free: int) -> bool:
        """Whether the upper end of the prediction fits."""
        return not self.spills(free)[0]

    def spills(self, free: int) -> tuple[bool, bool]:
        """Whether it does not fit, and whether the interval holds both outcomes."""
        needed = self.needed(free)
        margin, doubt = free - needed.total_bytes - self.reserve(needed), needed.uncertainty_bytes
        return margin < doubt, -doubt <= margin < doubt

    def at(self, free: int) -> Outlook:
        """What becomes of it with so much free."""
        needed = self.needed(free)
        reserve, (spills, tight) = self.reserve(needed), self.spills(free)
        placed = self.placer(needed).place(free - reserve) if spills and not self._on_host else None
        total = placed.total if placed else layers_total(self.calibration)
        layers = (placed.offloaded, placed.overflowing) if placed else (None, None) if spills or self._on_host else (total, 0)
        decode = decode_speed(self.calibration, placed) if placed or not spills else None
        return Outlook(needed, reserve, spills, tight, total, layers, placed, decode)

    def placer(self, needed: Prediction) -> Placer:
        """Where its layers go in the batch of a prediction."""
        if needed.num_batch not in self._placers:
            self._placers[needed.num_batch] = Placer(self.calibration, needed, self.rules)
        return self._placers[needed.num_batch]


def layers_total(calibration: Calibration) -> int | None:
    """The repeating layers and the output."""
    layers = calibration.metadata.model.layers
    return None if layers is None else layers + 1


def decode_speed(calibration: Calibration, placed: Placed | None) -> float | None:
    """Tokens per second; the time of a token is the sum over what is on each side."""
    performance = calibration.metadata.performance.bounded
    fast, slow = performance.decode_tokens_per_s, performance.host_decode_tokens_per_s
    if calibration.metadata.machine.target == "host":
        return slow if fast is None else fast
    if placed is None or placed.host_work == 0.0:
        return fast
    if not fast or not slow:
        return None
    seconds = (1.0 - placed.host_work) / fast + placed.host_work / slow
    return round(1.0 / seconds, 2)
