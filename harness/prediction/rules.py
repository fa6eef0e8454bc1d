"""What an engine decides before it loads a model: memory that it keeps free, the batch that it takes, what it evicts.

The class below is llama.cpp's own rule (``common/fit.cpp``, b10434); engines that decide otherwise override it
(:mod:`harness.engines.policy`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import msgspec

from harness.errors import UnknownVerdictError, UsageError
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.prediction.memory import Prediction
from harness.units import MIB, from_gib

#: What llama.cpp's fit keeps free on a device (common/common.h, ``fit_params_target``).
FIT_TARGET: Final = 1024 * MIB
#: Values that llama.cpp's switches take for off (common/arg.cpp, ``is_falsey``).
_OFF: Final = ("off", "disabled", "false", "0")
#: What llama.cpp's server comes to take of host memory beside a model, and what limits it (tools/server/README.md).
SERVER_CACHES: Final = "the server's prompt cache and checkpoints (LLAMA_ARG_CACHE_RAM, LLAMA_ARG_CTX_CHECKPOINTS)"
#: Rounding of one part, bytes: llama.cpp prints MiB with two decimals; a part is the sum of a few such figures.
LOG_ROUNDING: Final = 0.02 * MIB


def fit_is_off(env: Mapping[str, str]) -> bool:
    """Whether a server with these variables leaves layers where its options put them (``LLAMA_ARG_FIT``)."""
    return env.get("LLAMA_ARG_FIT") in _OFF


def fit_reserve(env: Mapping[str, str], usual: int = FIT_TARGET) -> int:
    """What llama.cpp's fit keeps free on the first device, bytes (``LLAMA_ARG_FIT_TARGET``, MiB; a list has one a device)."""
    target = env.get("LLAMA_ARG_FIT_TARGET", "").partition(",")[0]
    return 0 if fit_is_off(env) else int(target) * MIB if target.isdecimal() else usual


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """Host memory beside what was measured: bytes at most, and for people what they are for."""

    most: int
    what: str


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
    max_context: int | None


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an engine's decision, about ``cards`` and ``model``; ``figures`` are bytes, counts or percents by name."""

    step: str
    cards: tuple[str, ...] = ()
    model: str | None = None
    figures: dict[str, int] = {}


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that runs: its name, and bytes that it takes of each device, by name."""

    name: str
    on_devices: dict[str, int] = {}


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the devices an engine uses for a model, and how it lays layers over them.

    ``cards`` are positions in what was free; ``reserves`` what each of them keeps free, bytes, ``None`` for the rule's own;
    ``shares`` a given split (``--tensor-split``); without ``rearranges`` the first split is final.
    """

    cards: tuple[int, ...]
    reserves: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    rearranges: bool = True
    reasons: tuple[Reason, ...] = ()


#: llama.cpp's options that place layers or tensors in ways that are not calculated here (common/arg.cpp).
_PLACED_BY_HAND: Final = (
    *("LLAMA_ARG_N_GPU_LAYERS", "LLAMA_ARG_OVERRIDE_TENSOR", "LLAMA_ARG_N_CPU_MOE", "LLAMA_ARG_CPU_MOE"),
    "LLAMA_ARG_DEVICE",
)


class Rules:
    """The decisions of one engine about a calibrated model. Pure."""

    #: The engine's name in ids and options, and in sentences.
    name: ClassVar[EngineName]
    title: ClassVar[str]
    #: Whether a model that does not fit is partly on the host; else it does not start.
    spills: ClassVar[bool] = True
    #: Whether its KV cache is an array of ggml blocks, so that another type changes it by the ratio of their sizes.
    ggml_caches: ClassVar[bool] = True
    #: The most sequences of one server (llama.h, ``LLAMA_MAX_SEQ``).
    max_slots: ClassVar[int] = 256

    def check_slots(self, num_parallel: int) -> None:
        """Refuse a number of slots with which the engine does not start.

        Raises:
            UsageError: it is more than :attr:`max_slots`.
        """
        if num_parallel > self.max_slots:
            raise UsageError(
                f"{self.title} has at most {self.max_slots:,} slots, not {num_parallel:,}",
                hint=f"ask for {self.max_slots} or fewer",
                code="too-many-slots",
            )

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

    def edges(self, calibration: Calibration, context: int, num_parallel: int) -> tuple[int, ...]:
        """Free bytes of one device from which on its batch, or what it ends for this model, may be another."""
        return ()

    def evicted(
        self,
        calibration: Calibration,
        context: int,
        num_parallel: int,
        available: tuple[int, ...],
        names: tuple[str, ...],
        loaded: Sequence[LoadedModel],
    ) -> tuple[Reason, ...]:
        """Which of the models that are loaded it ends before it starts this one, and why: a reason each, in its order.

        ``available`` is what is free on each device, with all of them loaded; ``loaded`` stands in the order in which they go.
        """
        return ()

    def most_loaded(self, calibration: Calibration, devices: int) -> int | None:
        """How many models it keeps loaded on so many devices; ``None``: as many as there is room for."""
        return None

    def sized(self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...]) -> Sized | None:
        """What an instance takes, of an engine that offloads nothing to the host; ``None`` for one that places layers.

        Raises:
            UnknownVerdictError: the calibration does not answer for this.
        """
        return None

    def spread(
        self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...], names: tuple[str, ...]
    ) -> Spread:
        """The devices that it uses of those with ``available`` bytes free: llama.cpp all of them, layer by layer.

        Raises:
            UnknownVerdictError: layers or tensors are placed by options that are not calculated here.
        """
        env = calibration.metadata.settings.env
        mode = env.get("LLAMA_ARG_SPLIT_MODE", "layer")
        by_hand = [name for name in _PLACED_BY_HAND if name in env]
        if mode not in ("layer", "none") or by_hand:
            what = by_hand[0] if by_hand else f"LLAMA_ARG_SPLIT_MODE={mode}"
            raise UnknownVerdictError(f"with {what}, what each of several devices takes is not known")
        every = tuple(range(len(available)))
        if mode == "none":
            main = env.get("LLAMA_ARG_MAIN_GPU", "0")
            if not main.isdecimal() or int(main) not in every:
                raise UnknownVerdictError(f"LLAMA_ARG_MAIN_GPU={main} is none of {len(every)} devices")
            return Spread(cards=(int(main),))
        shares = None
        if given := env.get("LLAMA_ARG_TENSOR_SPLIT"):
            shares = _figures(given)
            if len(shares) != len(every) or sum(shares) <= 0:
                raise UnknownVerdictError(f"LLAMA_ARG_TENSOR_SPLIT={given} is not a split over {len(every)} devices")
        reserves = None
        if "," in (target := env.get("LLAMA_ARG_FIT_TARGET", "")):
            wanted = _figures(target)
            if len(wanted) > len(every):
                raise UnknownVerdictError(f"LLAMA_ARG_FIT_TARGET={target} names more than {len(every)} devices")
            reserves = (*(int(one) * MIB for one in wanted), *(FIT_TARGET,) * (len(every) - len(wanted)))
        return Spread(cards=every, reserves=reserves, shares=shares, rearranges=shares is None and not fit_is_off(env))

    def may_grow(self, calibration: Calibration, needed: Prediction, env: Mapping[str, str]) -> Growth | None:
        """What a server of the user's, with ``env``, may come to take of host memory; ``None``: nothing that is known."""
        return None

    def log_rounding(self, calibration: Calibration) -> float:
        """How far rounding in the log may move one part of a calibration, bytes."""
        return LOG_ROUNDING


def _figures(text: str) -> tuple[float, ...]:
    """A list of numbers, separated by commas or slashes."""
    try:
        found = tuple(float(one) for one in text.replace("/", ",").split(","))
    except ValueError as error:
        raise UnknownVerdictError(f"{text} is not a list of numbers") from error
    if not all(0 <= one < 2**40 for one in found):
        raise UnknownVerdictError(f"{text} is not a list of sizes")
    return found
