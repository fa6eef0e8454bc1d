"""What an engine decides before it loads a model: memory that it keeps free, the batch that it takes, what it evicts.

The class below is llama.cpp's own rule (``common/fit.cpp``, b10434); engines that decide otherwise override it
(:mod:`harness.engines.policy`).
"""

from __future__ import annotations

from typing import ClassVar, Final

import msgspec

from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.units import MIB, from_gib

#: What llama.cpp's fit keeps free on a device (common/common.h, ``fit_params_target``).
FIT_TARGET: Final = 1024 * MIB
#: Rounding of one part, bytes: llama.cpp prints MiB with two decimals; a part is the sum of a few such figures.
LOG_ROUNDING: Final = 0.02 * MIB


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """A model stays on its device if ``required + reserve_of(overhead) <= available``.

    ``start_bytes`` is what the engine has taken when it reads what is free; what comes later comes out of the reserve.
    ``estimates`` says that the engine decides by an estimate of its own, which may differ from what it then takes;
    ``go_runner`` that Ollama's Go runner places the layers, not llama.cpp's fit.
    """

    reserve_bytes: int
    start_bytes: int | None = None
    go_runner: bool = False
    estimates: bool = False

    def reserve_of(self, overhead: int | None) -> int:
        """What has to be free beside a model whose overhead is ``overhead``, bytes."""
        if self.start_bytes is None or overhead is None:
            return self.reserve_bytes
        return max(self.reserve_bytes - max(overhead - self.start_bytes, 0), 0)


class Sized(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance takes of the fullest of its devices, of an engine that starts with that or not at all; bytes, tokens."""

    required_bytes: int
    reserve_bytes: int
    available_bytes: int
    short_bytes: int
    max_context: int


class Rules:
    """The decisions of one engine about a calibrated model. Pure."""

    #: The engine's name in ids and options, and in sentences.
    name: ClassVar[EngineName]
    title: ClassVar[str]
    #: Whether a model that does not fit is partly on the host; else it does not start.
    spills: ClassVar[bool] = True
    #: Whether its KV cache is an array of ggml blocks, so that another type changes it by the ratio of their sizes.
    ggml_caches: ClassVar[bool] = True

    def placement(self, calibration: Calibration) -> Rule:
        """The placement rule of the version that a calibration was made with.

        llama.cpp reads free memory when its driver context is there already, so that context counts as required; kernels and
        workspaces come later, out of what it has kept free.
        """
        metadata = calibration.metadata
        if metadata.machine.target == "host":
            return Rule(reserve_bytes=0)
        recorded, start = metadata.placement.reserve_gb, metadata.placement.start_gb
        return Rule(
            reserve_bytes=FIT_TARGET if recorded is None else from_gib(recorded),
            start_bytes=None if start is None else from_gib(start),
        )

    def batch(self, calibration: Calibration, context: int, num_parallel: int, available: int | None) -> int | None:
        """The physical batch that it will take, of those measured; ``None`` where it takes one at every context."""
        return None

    def evicts(self, calibration: Calibration, context: int, num_parallel: int, available: int, loaded: int) -> bool:
        """Whether it ends one of ``loaded`` models before it starts this one."""
        return False

    def sized(self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...]) -> Sized | None:
        """What an instance takes, of an engine that offloads nothing to the host; ``None`` for one that places layers.

        Raises:
            UnknownVerdictError: the calibration does not answer for this.
        """
        return None

    def log_rounding(self, calibration: Calibration) -> float:
        """How far rounding in the log may move one part of a calibration, bytes."""
        return LOG_ROUNDING
