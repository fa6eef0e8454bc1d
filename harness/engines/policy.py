"""What an engine decides, and how it is measured: the pure half of the seam. :mod:`harness.engines.base` is the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import PARTS_UNKNOWN
from harness.model.facts import LoadFacts
from harness.model.record import LoadRequest, VllmSettings
from harness.prediction.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness.engines.base import Options, Source
    from harness.errors import HarnessError
    from harness.fit.load_plan import BatchLimits, LoadOrder
    from harness.model.calibration import Calibration
    from harness.model.facts import LoadFacts
    from harness.model.record import Gpu, Load, LoadRequest, Record, Target, VllmSettings
    from harness.model.start_command import StartCommand
    from harness.prediction.allocation import Allocation, Deployment
    from harness.prediction.settings import AskedSettings
    from harness.prediction.verdict import Verdict

#: Variables of llama.cpp's server that place layers, and others that change memory (common/arg.cpp).
LLAMA_PLACING: Final = ("LLAMA_ARG_N_GPU_LAYERS", "LLAMA_ARG_N_CPU_MOE", "LLAMA_ARG_FIT", "LLAMA_ARG_FIT_TARGET")
LLAMA_MEMORY: Final = (
    *("LLAMA_ARG_CPU_MOE", "LLAMA_ARG_OVERRIDE_TENSOR", "LLAMA_ARG_SPLIT_MODE", "LLAMA_ARG_TENSOR_SPLIT", "LLAMA_ARG_DEVICE"),
    *("LLAMA_ARG_KV_OFFLOAD", "LLAMA_ARG_NO_KV_OFFLOAD", "LLAMA_ARG_SWA_FULL", "LLAMA_ARG_KV_UNIFIED", "LLAMA_ARG_OVERRIDE_KV"),
    *("LLAMA_ARG_MMPROJ", "LLAMA_ARG_MODEL_DRAFT"),
)


class LoggedLoad(msgspec.Struct, frozen=True):
    """A load as its log describes it, with what was asked of it, its settings, and notes for the calibration."""

    facts: LoadFacts
    request: LoadRequest
    settings: VllmSettings | None
    notes: tuple[str, ...]


class Policy(Rules):
    """The decisions of one engine. Pure: no I/O, no clock, no environment.

    The defaults are those of a server that loads one GGUF at each start and leaves placement to llama.cpp's fit.
    """

    #: The type of its KV cache where it is unset.
    default_cache_type: ClassVar[str] = "f16"
    #: Whether it can print the memory of a layout without loading weights (llama.cpp's ``--fit``).
    has_dry_runs: ClassVar[bool] = False
    #: Whether it loads GGUF files by their path; else it has names of its own for models.
    loads_files: ClassVar[bool] = False
    #: Whether its loads depend on each other, so that they are planned anew when a model is measured again.
    plans_anew: ClassVar[bool] = False
    #: Whether it can load weights that are not there (vLLM's ``--load-format dummy``), from its own files of a model.
    dummy_weights: ClassVar[bool] = False
    #: What its log says as soon as it knows which devices it has; ``None``: nothing.
    devices_line: ClassVar[bytes | None] = None
    #: The program that an image of it starts; ``None``: it is not known.
    program: ClassVar[str | None] = None
    #: Variables that name the model which a process of it has.
    name_variables: ClassVar[tuple[str, ...]] = ()
    #: Variables of its server that change what a load takes, and are not calculated; those that place layers among them.
    memory_variables: ClassVar[tuple[str, ...]] = ()
    placing_variables: ClassVar[frozenset[str]] = frozenset()
    #: Those of its server that a verdict is calculated with.
    verdict_variables: ClassVar[tuple[str, ...]] = ()
    #: The variable for the number of slots.
    slots_variable: ClassVar[str] = ""
    #: Whether it can run with nothing on a GPU.
    runs_on_host: ClassVar[bool] = True
    #: Physical batch of embedding models, at most the context: Ollama's default for them (llm/llama_server.go).
    embedding_batch: ClassVar[int] = 2048

    def uncalculated(self, calibration: Calibration, cards: int) -> tuple[str, ...]:
        """:attr:`memory_variables` that count for a calibration where the machine has so many cards."""
        return self.memory_variables

    def settings(self, source: Source, options: Options, num_batch: int | None) -> VllmSettings | None:
        """What its memory depends on beside the common settings, as asked; the log says later what was in force."""
        return None

    def plan(
        self,
        contexts: Sequence[int],
        train_context: int | None,
        *,
        num_batch: int | None,
        batch_limits: BatchLimits,
        num_parallel: int,
        embedding: bool = False,
    ) -> tuple[LoadRequest, ...]:
        """The loads that measure memory; an embedding model reads its prompt in one batch."""
        from harness.fit.load_plan import plan_loads, usable_contexts

        if embedding and num_batch is None:
            num_batch = min(self.embedding_batch, *usable_contexts(contexts, train_context))
        return plan_loads(contexts, train_context, num_batch=num_batch, batch_limits=batch_limits, num_parallel=num_parallel)

    def order(
        self, planned: Sequence[LoadRequest], record: Callable[[], Record], free_bytes: Callable[[str], int | None]
    ) -> LoadOrder:
        """In which order they are made, and what follows from each.

        ``record`` is the record so far; ``free_bytes`` what is free on a GPU, by its UUID.
        """
        from harness.fit.load_plan import smaller_first

        return smaller_first(planned, record)

    def outcome(self, load: Load, target: Target) -> str | None:
        """What to say of a load that became ready beside its memory; ``None``: nothing."""
        from harness.fit.observations import spill_reason, understood

        if load.facts is None or not understood(load.facts):
            return PARTS_UNKNOWN if load.ready is not None else None
        return spill_reason(load.facts, target, ready=load.ready is not None)

    def describe(self, facts: LoadFacts, target: Target) -> str:
        """Where a load is placed, by its log, for people."""
        from harness.prediction.verification import describe_placement

        return describe_placement(facts, target)

    def speed_request(self, record: Record) -> LoadRequest | None:
        """The load under which speeds are timed, with the engine's own defaults; ``None`` where no load became ready."""
        from harness.fit.load_plan import is_point
        from harness.model.record import LoadRequest

        contexts = [load.request.context for load in record.loads if is_point(load, record.machine.target)]
        return LoadRequest(context=min(max(contexts), 8192), purpose="speed") if contexts else None

    def parse_log(self, data: bytes) -> list[LoadFacts]:
        """The loads that a log tells of, in its order."""
        from harness.logs import parse_log

        return parse_log(data)

    def explain_exit(self, facts: LoadFacts, status: int, tail: tuple[str, ...]) -> HarnessError | None:
        """Why it ended, where its log says that in words of its own; ``tail`` is its last lines."""
        return None

    def end_hint(self, tail: Sequence[str]) -> str | None:
        """What to do about an end that the last lines of the log explain; ``None``: nothing is known."""
        return None

    def refuse_start(self, log: bytes, gpus: Sequence[Gpu]) -> HarnessError | None:
        """Why a server that has just started cannot use the ``gpus`` that it was given, by its log; ``None``: it can."""
        return None

    def runs(self, words: Sequence[str]) -> bool:
        """Whether a process with this command line is one of it that has a model."""
        return False

    def client_environment(self, endpoint: str) -> dict[str, str]:
        """Variables by which the engine's own clients find a served model; ``endpoint`` is its base URL."""
        return {}

    def serve_environment(self, model: str, context: int) -> dict[str, str]:
        """Variables of a served engine beside those that were asked for: its name for the model, its context."""
        return {}

    def serve_request(
        self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...] | None
    ) -> LoadRequest:
        """The load as it was judged; ``available`` is what is free on each device."""
        from harness.model.record import LoadRequest

        return LoadRequest(context=context, purpose="serve", num_batch=calibration.band_for(context).num_batch)

    def batch_limits(self, version: str | None, *, target: str = "gpu", flash_attention: str = "auto") -> BatchLimits:
        """The batch that it takes where it is unset: (largest context, batch), ascending; empty where it is fixed."""
        return ()

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        """Device memory that its placement keeps free; ``None`` where it is not known."""
        return None

    def settings_by(self, env: Mapping[str, str]) -> AskedSettings:
        """The settings of a server with these variables; what is not set, or left to the engine, is ``None``."""
        from harness.prediction.settings import AskedSettings

        return AskedSettings()

    def unload_command(self, model: str) -> str | None:
        """What a user types so that a server gives a model's memory back; ``None``: it has no such command."""
        return None

    def mismatches(self, calibration: Calibration, wanted: Deployment) -> list[str]:
        """In what a calibration differs from what will run; empty where it answers for it."""
        return [f"it is one of {calibration.engine}"]

    def allocate(self, calibration: Calibration, context: int, concurrency: int, available: tuple[int, ...]) -> Allocation:
        """The start that holds ``concurrency`` sequences of ``context`` tokens at once; free bytes of each GPU of the instance.

        Raises:
            UnknownVerdictError: the calibration does not answer for this, or the engine takes what it needs by itself.
            OffloadLikelyError: it cannot be had (code ``does-not-fit``), with the largest context that can.
        """
        raise UnknownVerdictError(f"{self.title} takes the memory that a model needs; there is nothing to allocate")

    def start(self, calibration: Calibration, verdict: Verdict, available: tuple[int, ...]) -> StartCommand:
        """How it is started outside of harness so that it runs as was judged.

        Raises:
            UnknownVerdictError: the calibration does not say. OffloadLikelyError: it cannot be had.
        """
        raise UnknownVerdictError(f"how {self.title} is started outside of harness is not known", code="no-start")

    def command(self, allocation: Allocation) -> tuple[str, ...]:
        """The command line of a start that was allocated."""
        return ()

    def volumes(self) -> dict[str, str]:
        """Named volumes of a container that serves, and where they are mounted."""
        return {}

    def other_names(self, name: str) -> tuple[str, ...]:
        """What else the engine calls the model of a name."""
        return ()

    def imported(self, facts: LoadFacts, total: int | None, card: int | None) -> LoggedLoad | None:
        """What was asked of a load that its log alone describes; ``None``: it follows from its parts and a total.

        Args:
            facts: of the log.
            total: what all processes of the engine held, bytes, where it was read.
            card: the memory of each GPU, bytes, where it is known.

        Raises:
            UntrustedError: the log lacks figures. BadInputError: the total or the GPU's memory contradicts it.
        """
        return None

    def fit(self, record: Record) -> Calibration:
        """The calibration of a record.

        Raises:
            UntrustedError: no constants can be had from it.
        """
        from harness.fit.constants import fit_record

        return fit_record(record)
