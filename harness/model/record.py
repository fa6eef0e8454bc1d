"""One calibration run, as it is kept on disk: what was asked, what the log said, what the meter saw.

A record is immutable once its run has ended. Constants, predictions and verdicts are pure functions of it.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from harness.model.domains import Count, Digest, MemoryGb, Name, Tokens
from harness.model.facts import EngineName, LoadFacts
from harness.model.trace import MemoryTrace, MeterName, Occupancy, Plateau

#: Schema history: 1 — first version.
RECORD_VERSION: Final = 1

#: The type of a cache that no log line names.
UNKNOWN_CACHE: Final = "unknown"

Target = Literal["gpu", "host"]
Purpose = Literal["point", "planned", "buffers", "speed", "host-speed", "dry-run", "warm-up", "serve"]
#: What was there of the model: all of it, or a header and a hole as long as the weights.
Weights = Literal["full", "header"]
LoadOutcome = Literal["ok", "wont-fit", "spilled", "failed", "skipped"]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The exact model. ``digest`` is the SHA-256 of its GGUF (of the model layer, for Ollama).

    ``stored_digest`` is that of the weights as the engine keeps them, where they are not the file that it was sent: Ollama from
    0.30 on adds what a header lacks.
    """

    name: Name
    digest: Digest | None = None
    stored_digest: Digest | None = None
    architecture: Name | None = None
    quantization: Name | None = None
    train_context: Tokens | None = None
    layers: Count | None = None


class EngineVersion(msgspec.Struct, frozen=True, kw_only=True):
    """The exact engine. ``image`` and ``image_digest`` are ``None`` outside containers.

    ``named`` is whether the user named the program or the image; else it was the embedded, the installed or the pinned one.
    """

    version: Name | None = None
    image: Name | None = None
    image_digest: Digest | None = None
    named: bool = False


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM's memory depends on beside the common settings. ``model`` is its own name or path of the model.

    ``arguments`` are the options that the user added; everything else is what was in force, ``None`` where it was not said.
    """

    model: Name
    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    max_num_seqs: Count
    max_num_batched_tokens: Tokens | None = None
    dtype: Name | None = None
    quantization: Name | None = None
    enforce_eager: bool = False
    arguments: tuple[str, ...] = ()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the engine at every load; ``num_batch`` is ``None`` where each band has its own."""

    num_parallel: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    num_batch: Tokens | None = None
    kv_cache_type: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,31}(/[A-Za-z0-9_.+-]{1,32})?$")] = "f16"
    flash_attention: Literal["enabled", "disabled"] | None = None
    env: dict[str, str] = {}
    vllm: VllmSettings | None = None

    @property
    def own_model(self) -> str | None:
        """The engine's own name or path of the model, of an engine that records it."""
        return None if self.vllm is None else self.vllm.model

    @property
    def sequences(self) -> int | None:
        """Sequences at once, of an engine that shares its KV cache among them."""
        return None if self.vllm is None else self.vllm.max_num_seqs

    @property
    def dtype(self) -> str | None:
        """The type of weights and activations, where the engine has one for all."""
        return None if self.vllm is None else self.vllm.dtype

    @property
    def gpus(self) -> int:
        """GPUs of one instance, of an engine that splits a model evenly over so many."""
        return 1 if self.vllm is None else self.vllm.tensor_parallel * self.vllm.pipeline_parallel

    @property
    def own(self) -> dict[str, str | int | float | None]:
        """The settings of the engine's own, by names that begin with the engine's; texts and numbers."""
        fields = {} if self.vllm is None else msgspec.structs.asdict(self.vllm)
        return {f"vllm {name}": " ".join(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def asked_cache_type(self) -> str | None:
        """The KV cache type to ask for so that it is this one; ``None``: the engine's own, or two that differ."""
        own = ("f16", "auto", UNKNOWN_CACHE, self.vllm.dtype if self.vllm else None)
        return None if self.kv_cache_type in own or "/" in self.kv_cache_type else self.kv_cache_type


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU of a run. ``uuid`` is NVIDIA's; of a GPU that the meter ``drm`` reads it is the PCI address."""

    name: Name
    uuid: Name | None = None
    memory_gb: MemoryGb | None = None
    driver: Name | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how it was measured; the sandbox of imported loads is ``unknown``.

    ``total_cuda_gb`` is torch's total, which vLLM divides by (vLLM only).
    """

    target: Target
    sandbox: Literal["docker", "process", "unknown"]
    meter: MeterName
    gpus: tuple[Gpu, ...] = ()
    total_cuda_gb: MemoryGb | None = None

    def devices(self, joined: str = " + ") -> str:
        """Names of the GPUs, or host memory; an import may be of a GPU that its log does not name."""
        unnamed = "host memory" if self.target == "host" else "a GPU that was not named"
        return joined.join(gpu.name for gpu in self.gpus) or unnamed


class Tensors(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a model's tensors, from the GGUF's table: repeating layers in order, then output and embeddings.

    ``layer_bytes`` include ``expert_bytes``. ``expert_use`` is the share of the experts that one token goes through, ``width``
    how many numbers each token is between two layers.
    """

    layer_bytes: tuple[int, ...]
    output_bytes: int
    embedding_bytes: int
    expert_bytes: tuple[int, ...] = ()
    expert_use: float | None = None
    width: int | None = None


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What Ollama >= 0.30 estimates a model to take, unmeasured (``PredictServerVRAM``): its file, and so much a token."""

    file_bytes: int
    cache_bytes_per_token: int


class HeaderSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a header was read: an address or a file, and the revision there. For people: nothing is fetched from it."""

    address: Name
    revision: Name | None = None


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One load of a plan. ``context`` is in tokens per slot; ``num_batch`` the physical batch, ``None`` = the engine's.

    The purpose ``buffers`` is a plan of the compute buffers alone.
    ``gpu_layers`` (the output layer is one of them; ``None``: the engine's choice) and ``experts_on_host`` are for dry runs;
    on several devices these have ``split``, the layers of each, and ``without_experts``, how many of them, the last ones, leave
    their experts to the host.
    vLLM: ``utilization`` is the share of the GPU that it may take, ``kv_cache_bytes`` the size of its KV cache where that is
    given instead.
    """

    context: Tokens
    num_batch: Tokens | None = None
    purpose: Purpose = "point"
    gpu_layers: int | None = None
    experts_on_host: bool = False
    split: tuple[int, ...] = ()
    without_experts: tuple[int, ...] = ()
    utilization: float | None = None
    kv_cache_bytes: int | None = None


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """One timed request: tokens per second while reading a prompt of ``prompt_tokens`` and while writing after it."""

    prompt_tokens: int
    prompt_tokens_per_s: float | None
    decode_tokens: int
    decode_tokens_per_s: float | None


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine itself says of a load: bytes in all and on GPUs, and its context (Ollama's ``/api/ps``).

    vLLM (``GET /metrics``, ``vllm:cache_config_info``, and ``/version``): the blocks of its KV cache, and how many sequences
    of ``context`` tokens they hold.
    """

    total_bytes: int | None = None
    gpu_bytes: int | None = None
    context: int | None = None
    version: str | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    max_concurrency: float | None = None


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One load of a run.

    ``log`` names a file of the run, ``log_start``/``log_end`` the bytes of it that belong to this load. ``facts`` is what
    that stretch said when it was read; a later reader may read it again. ``idle`` is the plateau after loading,
    ``busy`` the one after a prompt. ``left_bytes`` is what the devices still held above their baseline after the model was
    unloaded (0: all came back; ``None``: not looked at). Seconds are since the start of the run; ``settle_seconds`` are
    those spent waiting for memory to settle, and to come back. ``cpu_by_others`` is the share of this machine's CPU time that
    other processes took while speeds were timed. ``prompt_tokens`` is the length of the prompt before ``busy``.
    """

    request: LoadRequest
    outcome: LoadOutcome
    reason: str | None = None
    log: str | None = None
    log_start: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] = 0
    log_end: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] | None = None
    facts: LoadFacts | None = None
    idle: Plateau | None = None
    busy: Plateau | None = None
    trace: MemoryTrace | None = None
    reported: Reported | None = None
    speeds: tuple[Speed, ...] = ()
    started: float = 0.0
    ready: float | None = None
    ended: float | None = None
    left_bytes: int | None = None
    settle_seconds: float = 0.0
    cpu_by_others: float | None = None
    request_seconds: float = 0.0
    prompt_tokens: int | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run.

    ``plan_error`` is how far the plan of the one load of a quick run was off what it then took, relative.
    ``status`` is ``partial`` when it was interrupted; ``before`` and ``after`` are what the devices held before the engine
    was started and after it had ended (``None``: the meter sees no devices).
    """

    schema_version: int = RECORD_VERSION
    run: str
    harness_version: str
    started_at: str
    ended_at: str | None = None
    seconds: float | None = None
    status: Literal["complete", "partial", "failed"] = "partial"
    id: str
    engine_name: EngineName
    model: Model
    engine: EngineVersion
    settings: Settings
    machine: Machine
    reserve_bytes: int | None = None
    tensors: Tensors | None = None
    estimate: Estimate | None = None
    batch_limits: tuple[tuple[int, int], ...] = ()
    loads: tuple[Load, ...] = ()
    before: Occupancy | None = None
    after: Occupancy | None = None
    notes: tuple[str, ...] = ()
    weights: Weights = "full"
    source: HeaderSource | None = None
    plan_error: float | None = None
    phases: tuple[tuple[str, float], ...] = ()
