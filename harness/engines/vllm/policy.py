"""What vLLM decides: nothing is offloaded and nothing is kept free; it starts with what it is given, or not at all."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from harness.engines.policy import LoggedLoad, Policy
from harness.engines.settings import ARGUMENTS, shown_words
from harness.errors import EngineError, HarnessError, NotFoundError, NotPermittedError, UsageError, WontFitError
from harness.model.calibration import Calibration
from harness.model.facts import LoadFacts
from harness.model.record import Load, LoadRequest, Record, Target, VllmSettings
from harness.model.start_command import StartCommand
from harness.prediction.rules import Sized

if TYPE_CHECKING:
    from harness.engines.base import Options, Source
    from harness.fit.load_plan import BatchLimits, LoadOrder
    from harness.prediction.allocation import Allocation, Deployment
    from harness.prediction.verdict import Verdict

#: Sequences at once where no number is given: enough to serve, few enough that their buffers stay small.
MAX_NUM_SEQS: Final = 8
_OURS: Final = frozenset(
    {
        *("--model", "--host", "--port", "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization"),
        *("--kv-cache-memory-bytes", "--kv-cache-memory", "--hf-token", "--api-key"),
    }
)
#: Failures that another length, share or moment may not have.
_OTHERWISE: Final = frozenset(
    {
        *("kv_too_small", "no_memory_for_cache", "free_below_utilization", "memory_moved", "out_of_memory"),
        "context_too_long",
    }
)


class VllmPolicy(Policy):
    """vLLM's decisions."""

    name = "vllm"
    title = "vLLM"
    spills = False
    ggml_caches = False
    default_cache_type = "auto"
    runs_on_host = False
    dummy_weights = True
    plans_anew = True
    max_slots = 4096

    def runs(self, words: Sequence[str]) -> bool:
        """``vllm serve``, by its program or by Python."""
        return any(word.rpartition("/")[2] == "vllm" for word in words[:2])

    def sized(self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...]) -> Sized | None:
        """By the blocks of its KV cache. Each GPU of an instance takes the same, so the fullest decides."""
        from harness.engines.vllm.allocation import size

        sizing = size(calibration, context, num_parallel, available)
        return Sized(
            required_bytes=sizing.required_bytes,
            reserve_bytes=sizing.margin_bytes,
            available_bytes=sizing.card.free,
            short_bytes=sizing.short_bytes,
            max_context=sizing.max_context or (None if sizing.bounded else 0),
        )

    def settings(self, source: Source, options: Options, num_batch: int | None) -> VllmSettings:
        """What is asked of every start; the log says later what was in force."""
        given = arguments(options)
        return VllmSettings(
            model=source.own_name,
            max_num_seqs=max_num_seqs(options),
            max_num_batched_tokens=num_batch,
            enforce_eager="--enforce-eager" in given,
            arguments=shown_words(given),
        )

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
        """One start by share, one by bytes."""
        from harness.engines.vllm.starts import plan

        return plan(contexts, train_context, num_batch)

    def order(
        self, planned: Sequence[LoadRequest], record: Callable[[], Record], free_bytes: Callable[[str], int | None]
    ) -> LoadOrder:
        """The longest length first; each start again with what a failed one has said."""
        from harness.engines.vllm.starts import order

        return order(planned, record().machine, free_bytes)

    def outcome(self, load: Load, target: Target) -> str | None:
        """What it was given, and the blocks that it made of it: nothing of vLLM's is ever offloaded."""
        from harness.engines.vllm.starts import said

        return said(load)

    def describe(self, facts: LoadFacts, target: Target) -> str:
        """What its cache holds."""
        tokens = "unknown" if facts.vllm is None or facts.vllm.kv_tokens is None else f"{facts.vllm.kv_tokens:,}"
        return f"the KV cache holds {tokens} tokens"

    def speed_request(self, record: Record) -> LoadRequest | None:
        """The last start that became ready."""
        from harness.engines.vllm.starts import speed_request

        return speed_request(record)

    def explain_exit(self, facts: LoadFacts, status: int, tail: tuple[str, ...]) -> HarnessError | None:
        """By the root cause in its log."""
        if facts.vllm is None or not facts.failed:
            return None
        kind = facts.vllm.failure_class
        text = facts.failure or f"vLLM ended with status {status}"
        if kind in _OTHERWISE:
            return WontFitError(text, tail=tail)
        if kind == "gated":
            hint = "ask for access on the model's page, then give a token: HF_TOKEN, or --env HF_TOKEN=…"
            return NotPermittedError(text, hint=hint, code="gated-model")
        if kind == "not_found":
            return NotFoundError(
                text, hint="look at the name; without a network the weights must be here already", code="no-such-model"
            )
        return EngineError(text, tail=tail, code="unsupported-model" if kind == "unsupported" else "engine-ended")

    def serve_request(
        self, calibration: Calibration, context: int, num_parallel: int, available: tuple[int, ...] | None
    ) -> LoadRequest:
        """Given exactly what its sequences need."""
        from harness.engines.vllm.starts import allocated

        return allocated(calibration, super().serve_request(calibration, context, num_parallel, None), num_parallel, available)

    def mismatches(self, calibration: Calibration, wanted: Deployment) -> list[str]:
        """Version, GPU, tensor parallel and dtype."""
        from harness.engines.vllm.allocation import mismatches

        return mismatches(calibration, wanted)

    def allocate(self, calibration: Calibration, context: int, concurrency: int, available: tuple[int, ...]) -> Allocation:
        """Exact by blocks from 0.10.2 on, by utilisation before."""
        from harness.engines.vllm.allocation import allocate

        return allocate(calibration, context, concurrency, available)

    def start(self, calibration: Calibration, verdict: Verdict, available: tuple[int, ...]) -> StartCommand:
        """As ``harness allocate`` prints it."""
        found = self.allocate(calibration, verdict.context, verdict.num_parallel, available)
        settings = calibration.metadata.settings
        return StartCommand(
            program=("vllm", "serve"),
            arguments=("--model", found.model, *found.flags),
            port=8000,
            port_option="--port",
            variables={name: value for name, value in settings.env.items() if name != ARGUMENTS},
            volumes=self.volumes(),
            shared_memory=True,
            formats=("vllm",),
        )

    def command(self, allocation: Allocation) -> tuple[str, ...]:
        """``vllm serve``."""
        return ("vllm", "serve", allocation.model, *allocation.flags)

    def volumes(self) -> dict[str, str]:
        """Weights, and compiled graphs."""
        return {"huggingface": "/root/.cache/huggingface", "vllm": "/root/.cache/vllm"}

    def imported(self, facts: LoadFacts, total: int | None, card: int | None) -> LoggedLoad | None:
        """By its log alone, or with the memory of the GPU; on host memory with the total."""
        from harness.engines.vllm.imported import imported

        return imported(facts, total, card)

    def fit(self, record: Record) -> Calibration:
        """From starts by share and by bytes."""
        from harness.engines.vllm.fit import fit_vllm

        return fit_vllm(record)


def arguments(options: Options) -> tuple[str, ...]:
    """The user's own options of ``vllm serve``.

    Raises:
        UsageError: quotes that do not end, or an option that is set here, or would show a secret.
    """
    try:
        words = tuple(shlex.split(options.env.get(ARGUMENTS, "")))
    except ValueError as error:
        raise UsageError(f"{ARGUMENTS} is not a command line: {error}") from error
    taken = [word for word in words if _is_ours(word)]
    if taken:
        raise UsageError(
            f"{ARGUMENTS} may not hold {taken[0].partition('=')[0]}",
            hint="lengths, memory and the server's address are set by harness; a token is given with --env HF_TOKEN=…",
        )
    return words


def _is_ours(word: str) -> bool:
    """Whether an option is one of ours: the parser takes ``_`` for ``-``, and any beginning of a name for the whole."""
    name = word.partition("=")[0].replace("_", "-")
    return len(name) > 2 and any(own.startswith(name) for own in _OURS)


def max_num_seqs(options: Options) -> int:
    """Sequences at once: what was asked for with ``--num-parallel``, where that is more than one."""
    return options.num_parallel if options.num_parallel > 1 else MAX_NUM_SEQS
