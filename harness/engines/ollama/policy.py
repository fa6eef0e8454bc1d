"""What Ollama decides: its batch, what it keeps free and what it ends.

Sources: ``server/sched.go`` and ``llm/llama_server.go`` (0.30 and later, which start llama.cpp's server with a batch of
Ollama's choice), ``ml/device.go`` and ``llm/memory.go`` (before).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from harness.engines.ollama.scheduler import (
    BATCHES,
    FULL_PERCENT,
    HEADROOM_PERCENT,
    MODELS_PER_CARD,
    SURCHARGE,
    Card,
    Decision,
    Resident,
    SchedulerRequest,
    SchedulerSettings,
    automatic_batch,
    batch_fits,
    decide,
)
from harness.engines.policy import LLAMA_MEMORY, LLAMA_PLACING, Policy
from harness.errors import HarnessError, UnavailableError, UnknownVerdictError
from harness.model.calibration import Calibration
from harness.model.record import LoadRequest
from harness.model.start_command import StartCommand
from harness.prediction.host import server_caches
from harness.prediction.memory import Prediction, predict
from harness.prediction.rules import FIT_TARGET, SERVER_CACHES, Growth, LoadedModel, Reason, Rule, Spread, fit_reserve
from harness.prediction.settings import AskedSettings
from harness.text import release
from harness.units import GIB, MIB, TOKENS_PER_UNIT, from_gib

if TYPE_CHECKING:
    from harness.fit.load_plan import BatchLimits
    from harness.model.record import Gpu
    from harness.prediction.verdict import Verdict

#: The first version that runs llama.cpp's own server.
LLAMA_SERVER: Final = (0, 30, 0)
#: What the Go runner sets aside for the driver's own memory (CUDA), in place of measuring it (ml/device.go, ``MinimumMemory``).
GO_MINIMUM: Final = 457 * MIB
#: Rounding of one part by the Go runner (format.HumanBytes2: one decimal of GiB).
GO_ROUNDING: Final = 0.05 * GIB
#: Root of a container without any capability has no right over files of another account.
CLOSED_FOLDER: Final = (
    "root of a container has no right over files of another account: sudo chmod -R o+rX on {}, lend a copy with --models DIR, "
    "or leave Docker out (--sandbox process)"
)
#: What of host memory is kept small while it is measured: gemma3-270m at 32,768 tokens, 0.12.11: 629 and 699 MiB.
GO_HEAP: Final = "the Go heap of a server of your own (it was measured with GOGC=1)"
GO_HEAP_SHARE: Final = 0.12
#: What a server names at its start (discover/types.go), and the drivers that it leaves alone (discover/cuda_compat.go).
_LIBRARY: Final = re.compile(r'msg="inference compute"[^\n]*? library=(\w+)')
_OLD_DRIVER: Final = re.compile(
    r'msg="NVIDIA driver too old"[^\n]*? driver=(?P<driver>\S+) required_driver="(?P<needed>[^"\n]{1,40})"'
)
#: Which cards a server sees (ml/device.go, ``updateVisibleDevicesEnv``).
VISIBLE: Final = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")


class OllamaPolicy(Policy):
    """Ollama's decisions."""

    name = "ollama"
    title = "Ollama"
    devices_line = b'msg="inference compute"'
    program = "ollama"
    slots_variable = "OLLAMA_NUM_PARALLEL"
    placing_variables = frozenset(LLAMA_PLACING)
    verdict_variables = ("OLLAMA_SCHED_SPREAD", "OLLAMA_MAX_LOADED_MODELS")

    def uncalculated(self, calibration: Calibration, cards: int) -> tuple[str, ...]:
        """Since 0.30 what llama.cpp's server inherits, before it ``OLLAMA_GPU_OVERHEAD``; which of several cards are seen.

        Since 0.30 that one decides about the automatic context alone (server/routes.go), and sched.go prints it.
        """
        new = since_llama_server(calibration.metadata.engine.version)
        own = (*LLAMA_PLACING, *LLAMA_MEMORY) if new else ("OLLAMA_GPU_OVERHEAD",)
        return (*own, *VISIBLE) if cards > 1 else own

    def other_names(self, name: str) -> tuple[str, ...]:
        """``latest`` is the tag of a name that has none (types/model/name.go); ``ollama list`` prints it."""
        model, _, tag = name.rpartition(":")
        if tag == "latest" and ":" not in model.rpartition("/")[2]:
            return (model,)
        return () if ":" in name.rpartition("/")[2] else (f"{name}:latest",)

    def runs(self, words: Sequence[str]) -> bool:
        """Its server and its runners: ``--model …/blobs/sha256-DIGEST`` (llm/llama_server.go), in containers too."""
        program = words[0].rpartition("/")[2]
        return program in ("ollama", "ollama_llama_server") or (program == "llama-server" and "/ollama/" in words[0])

    def end_hint(self, tail: Sequence[str]) -> str | None:
        """A folder of models that belongs to another account (``mkdir /ollama/blobs: permission denied``)."""
        closed = any("permission denied" in line and ("/blobs" in line or "/manifests" in line) for line in tail)
        return CLOSED_FOLDER.format("that folder of models") if closed else None

    def refuse_start(self, log: bytes, gpus: Sequence[Gpu]) -> HarnessError | None:
        """Its ``inference compute`` lines name the CPU alone (discover/types.go), since the driver is too old as a rule."""
        text = log.decode("utf-8", "replace")
        libraries = set(_LIBRARY.findall(text))
        if not libraries or libraries != {"cpu"}:
            return None
        names = ", ".join(f"{gpu.name} (driver {gpu.driver or 'unknown'})" for gpu in gpus) or "a GPU"
        old = _OLD_DRIVER.search(text)
        why, hint = "", "see whether a container gets a GPU at all: docker run --rm --gpus all IMAGE nvidia-smi; harness doctor"
        if old is not None:
            why = f": its driver {old['driver']} is too old for this Ollama, which needs {old['needed']}"
            hint = f"install NVIDIA's driver {old['needed']}, or name an older Ollama (--image ollama/ollama:0.30.10)"
        return UnavailableError(
            f"Ollama sees no GPU (library=cpu in its log), and was given {names}{why}",
            hint=f"{hint}; --gpus none measures host memory",
            code="gpu-not-seen",
        )

    def placement(self, calibration: Calibration) -> Rule:
        """From 0.30 on llama.cpp's fit decides.

        The Go runner (0.12.11 to 0.24) reads free memory before the driver's context is there and sets a fixed amount aside for
        it; earlier ones decide by closed formulas.
        """
        metadata = calibration.metadata
        version = release(metadata.engine.version)
        if metadata.machine.target == "host" or version is None or version >= LLAMA_SERVER:
            return super().placement(calibration)
        overhead = from_gib(metadata.breakdown_gb.overhead or 0.0)
        return Rule(reserve_bytes=max(GO_MINIMUM - overhead, 0), go_runner=True, estimates=version < (0, 12, 11))

    def batch(self, calibration: Calibration, context: int, num_parallel: int, available: int | None) -> int | None:
        """By the context of all slots, then less while its own estimate is above a share of the free memory.

        On CUDA without flash attention it is 512 (``automaticGenerationBatch``).
        """
        measured = sorted({band.num_batch for band in calibration.metadata.bands if band.num_batch is not None})
        if len(measured) < 2:
            return None
        cells = context * num_parallel
        wanted = automatic_batch(cells)
        metadata = calibration.metadata
        if metadata.settings.flash_attention == "disabled" and metadata.machine.meter == "nvml":
            wanted = 512
        if available is not None:
            estimate = estimated(calibration, context, num_parallel)
            while wanted > measured[0] and wanted in HEADROOM_PERCENT:
                if available and batch_fits(wanted, estimate, available):
                    break
                wanted //= 2
        return max((batch for batch in measured if batch <= wanted), default=measured[0])

    def edges(self, calibration: Calibration, context: int, num_parallel: int) -> tuple[int, ...]:
        """Where its estimate, with what a batch adds, is one of the shares of the free memory that it looks at."""
        estimate = estimated(calibration, context, num_parallel)
        sizes = [estimate + more for more in (0, *SURCHARGE.values())]
        return tuple(-(-100 * size // percent) for size in sizes for percent in (FULL_PERCENT, *HEADROOM_PERCENT.values()))

    def evicted(
        self,
        calibration: Calibration,
        context: int,
        num_parallel: int,
        available: tuple[int, ...],
        names: tuple[str, ...],
        loaded: Sequence[LoadedModel],
    ) -> tuple[Reason, ...]:
        """From 0.30 on: where its own estimate is above 80 % of what is free, or too many are loaded (sched.go, ``load``)."""
        decision = _decide(calibration, context, num_parallel, available, names, loaded)
        return tuple(one for one in decision.reasons if one.step in ("evict-limit", "evict-memory"))

    def most_loaded(self, calibration: Calibration, devices: int) -> int | None:
        """Three on each card, or ``OLLAMA_MAX_LOADED_MODELS``."""
        return _settings(calibration).max_loaded or MODELS_PER_CARD * max(devices, 1)

    def spread(
        self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...], names: tuple[str, ...]
    ) -> Spread:
        """One card where its estimate is at most 80 % of what is free there, else all: see ``scheduler.py``.

        Raises:
            UnknownVerdictError: layers are placed by options that are not calculated here, or by the Go runner.
        """
        metadata = calibration.metadata
        if not since_llama_server(metadata.engine.version):
            if len(available) > 1:
                raise UnknownVerdictError(
                    f"how Ollama {metadata.engine.version} spreads a model over {len(available)} GPUs is not known"
                )
            return Spread(cards=(0,))
        decision = _decide(calibration, context, num_parallel, available, names)
        cards = tuple(index for index, name in enumerate(names) if name in decision.cards)
        if len(cards) < 2:
            return Spread(cards=cards, reasons=decision.reasons)
        usual = super().spread(calibration, context, num_parallel, tuple(available[one] for one in cards), decision.cards)
        return msgspec.structs.replace(usual, cards=tuple(cards[one] for one in usual.cards), reasons=decision.reasons)

    def may_grow(self, calibration: Calibration, needed: Prediction, env: Mapping[str, str]) -> Growth | None:
        """On host memory: the heap of the Go runner, kept small while it is measured; since 0.30 llama.cpp's caches."""
        if since_llama_server(calibration.metadata.engine.version):
            return Growth(most=server_caches(calibration, needed, env), what=SERVER_CACHES)
        on_host = calibration.metadata.machine.target == "host"
        return Growth(most=round(GO_HEAP_SHARE * needed.total_bytes), what=GO_HEAP) if on_host else None

    def log_rounding(self, calibration: Calibration) -> float:
        """The Go runner's log has one decimal of GiB; it ended with 0.30."""
        version = release(calibration.metadata.engine.version)
        return GO_ROUNDING if version is not None and version < LLAMA_SERVER else super().log_rounding(calibration)

    def client_environment(self, endpoint: str) -> dict[str, str]:
        """``OLLAMA_HOST``, which every client of Ollama's reads."""
        return {"OLLAMA_HOST": endpoint}

    def serve_environment(self, model: str, context: int) -> dict[str, str]:
        """The context of requests that name none."""
        return {"OLLAMA_CONTEXT_LENGTH": str(context)}

    def serve_request(
        self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...] | None
    ) -> LoadRequest:
        """Ollama chooses its batch itself: a request of another client would not name one either."""
        return LoadRequest(context=context, purpose="serve")

    def settings_by(self, env: Mapping[str, str]) -> AskedSettings:
        """``OLLAMA_KV_CACHE_TYPE`` and ``OLLAMA_FLASH_ATTENTION``."""
        flash: Literal["enabled", "disabled"] = "enabled" if is_on(env, "OLLAMA_FLASH_ATTENTION") else "disabled"
        return AskedSettings(
            kv_cache_type=env.get("OLLAMA_KV_CACHE_TYPE") or None,
            flash_attention=flash if env.get("OLLAMA_FLASH_ATTENTION") else None,
        )

    def unload_command(self, model: str) -> str:
        """``ollama stop``."""
        return f"ollama stop {shlex.quote(model)}"

    def start(self, calibration: Calibration, verdict: Verdict, available: tuple[int, ...]) -> StartCommand:
        """One server for all models: what it sets for each of them is its environment, what a model sets is its Modelfile.

        ``num_gpu`` is named where all layers fit, or none are wanted: then its fit may not place them otherwise.
        """
        metadata = calibration.metadata
        settings, slots = metadata.settings, verdict.num_parallel
        variables = {"OLLAMA_CONTEXT_LENGTH": str(verdict.context), "OLLAMA_NUM_PARALLEL": str(slots)}
        if settings.kv_cache_type != self.default_cache_type:
            variables["OLLAMA_KV_CACHE_TYPE"] = settings.kv_cache_type
        if settings.flash_attention is not None:
            variables["OLLAMA_FLASH_ATTENTION"] = "1" if settings.flash_attention == "enabled" else "0"
        if len(verdict.devices) > 1:
            variables["OLLAMA_SCHED_SPREAD"] = "1"
        variables |= settings.env
        free = sum(available) if available else None
        batch = self.batch(calibration, verdict.context, slots, free) or settings.num_batch
        layers = 0 if metadata.machine.target == "host" else verdict.layers_total
        parameters = {"num_ctx": verdict.context, "num_batch": batch, "num_gpu": layers if verdict.verdict == "fits" else None}
        return StartCommand(
            program=("ollama",),
            arguments=("serve",),
            port=11434,
            variables=variables,
            parameters={name: value for name, value in parameters.items() if value is not None},
            volumes={"ollama": "/root/.ollama"},
            health="/api/version",
            formats=("modelfile", "ollama-env"),
        )

    def batch_limits(self, version: str | None, *, target: str = "gpu", flash_attention: str = "auto") -> BatchLimits:
        """Since 0.30 the batch follows the context where it is unset (and shrinks where memory is tight); before, 512.

        On NVIDIA GPUs, which are what Ollama's ``gpu`` target is here, it stays at 512 without flash attention
        (``automaticGenerationBatch``), and goes to 256 on cards of up to 8 GiB, which takes less.
        """
        if target == "gpu" and flash_attention == "off":
            return ()
        return BATCHES if since_llama_server(version) else ()

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        """Since 0.30 llama.cpp's fit decides (``LLAMA_ARG_FIT_TARGET``, MiB); before, Ollama's own minimum and overhead.

        With a projector, fit keeps its weights and 1 GiB free (``mmprojFitTargetMiB``).
        """
        if not since_llama_server(version):
            overhead = env.get("OLLAMA_GPU_OVERHEAD", "")
            return GO_MINIMUM + (int(overhead) if overhead.isdecimal() else 0)
        return fit_reserve(env, -(-(projector_bytes + FIT_TARGET) // MIB) * MIB)


def is_on(env: Mapping[str, str], name: str) -> bool:
    """Whether a switch of Ollama's is on: any text but those that Go reads as false is (envconfig/config.go, ``Bool``)."""
    return env.get(name, "").strip().strip("\"'") not in ("", "0", "f", "F", "false", "False", "FALSE")


def since_llama_server(version: str | None) -> bool:
    """Whether a version, like ``0.33.0-rc2``, is 0.30 or newer; an unknown one (a build of one's own) is taken as new."""
    found = release(version)
    return found is None or found >= LLAMA_SERVER or found[:2] == (0, 0)


def estimated(calibration: Calibration, context: int, num_parallel: int = 1) -> int:
    """What Ollama >= 0.30 estimates a model to take (``PredictServerVRAM``), bytes.

    Without its shape (imported logs) its weights and caches as they are: the estimate counts no compute.
    """
    placement = calibration.metadata.placement
    if placement.estimate_base_gb is None or placement.estimate_gb_per_10k is None:
        needed = predict(calibration, context, num_parallel)
        if needed.weights_bytes is None:
            return needed.total_bytes
        return needed.weights_bytes + (needed.fixed_cache_bytes or 0) + (needed.context_cache_bytes or 0)
    cells = context * num_parallel
    return from_gib(placement.estimate_base_gb + placement.estimate_gb_per_10k * cells / TOKENS_PER_UNIT)


def _settings(calibration: Calibration) -> SchedulerSettings:
    env = calibration.metadata.settings.env
    most = env.get("OLLAMA_MAX_LOADED_MODELS", "")
    return SchedulerSettings(spread=is_on(env, "OLLAMA_SCHED_SPREAD"), max_loaded=int(most) if most.isdecimal() else 0)


def _decide(
    calibration: Calibration,
    context: int,
    num_parallel: int,
    available: tuple[int, ...],
    names: tuple[str, ...],
    loaded: Sequence[LoadedModel] = (),
) -> Decision:
    """What the scheduler does with a calibrated model beside those that are loaded, which go in their order."""
    metadata = calibration.metadata
    layers, batch = metadata.model.layers, metadata.settings.num_batch if len(metadata.bands) == 1 else None
    library = {"nvml": "CUDA", "drm": "ROCm"}.get(metadata.machine.meter, "Vulkan")
    taken = [sum(one.on_devices.get(name, 0) for one in loaded) for name in names]
    return decide(
        SchedulerRequest(
            name=metadata.model.name,
            estimate_bytes=estimated(calibration, context, num_parallel),
            cells=context * num_parallel,
            flash_attention=metadata.settings.flash_attention != "disabled",
            num_batch=batch,
            layers_total=None if layers is None else layers + 1,
        ),
        [
            Card(name=name, free_bytes=free, total_bytes=free + held, library=library)
            for name, free, held in zip(names, available, taken, strict=True)
        ],
        [Resident(name=one.name, on_cards=one.on_devices, keep_alive_s=float(place)) for place, one in enumerate(loaded)],
        _settings(calibration),
    )
