"""What an engine's log says about one load of one model.

``LoadFacts`` is the only thing that the rest of the program knows about logs. A field is ``None`` where the log does not
say; it is never 0 for "unknown".
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

#: The name of an engine of :mod:`harness.engines.registry`.
EngineName = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9-]{0,31}$")]
#: Whose lines they are: ``llama.cpp``, ``ollama-go``, ``ollama-llama.cpp``, ``vllm``, or an engine's with a reader of its own.
Dialect = str
DeviceKind = Literal["gpu", "host"]

_HOST_NAMES: Final = frozenset({"CPU", "AMX", "BLAS", "Host"})


def device_kind(name: str) -> DeviceKind:
    """Whether a ggml buffer type is host memory: ``CPU``, ``CPU_*``, ``AMX``, ``BLAS``, ``Host`` and ``*_Host`` do.

    ``CUDA_Host`` and its kin are pinned system memory (ggml-cuda.cu, ``ggml_backend_cuda_host_buffer_type``).
    """
    host = name in _HOST_NAMES or name.startswith("CPU_") or name.endswith("_Host")
    return "host" if host else "gpu"


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one load on one device, as logged; ``None`` where no line was seen for that part.

    ``address``: where the server of a remote device listens (``RPC0``).
    """

    kind: DeviceKind
    address: str | None = None
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    recurrent_bytes: int | None = None
    compute_bytes: int | None = None
    output_bytes: int | None = None
    projector_bytes: int | None = None
    lora_bytes: int | None = None


class CacheFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One KV cache of a load (a sliding-window model has two, a draft model adds its own).

    ``cells`` are per stream. ``devices`` maps device names to bytes.
    """

    cells: int | None = None
    streams: int = 1
    layers: int | None = None
    role: Literal["full", "window", "draft"] = "full"
    devices: dict[str, int] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of this cache on all devices."""
        return sum(self.devices.values())


class FitRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of llama.cpp's memory breakdown, bytes (integer MiB in the log, truncated).

    ``reserved_bytes``: the same compute buffers to 0.01 MiB, where lines before the table name them.
    """

    device: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    self_bytes: int
    model_bytes: int
    context_bytes: int
    compute_bytes: int
    reserved_bytes: int | None = None


class FitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """llama.cpp's own projection for a load (``common_params_fit_impl``, common/fit.cpp).

    ``used``: bytes by device of the layout that it chose, where its lines name no parts.
    """

    rows: tuple[FitRow, ...] = ()
    used: dict[str, int] = {}
    projected_bytes: int | None = None
    free_bytes: int | None = None
    target_bytes: int | None = None

    def to_json(self) -> dict[str, object]:
        """The object ``projection`` of ``parse --json``: a ``fit`` of the engine, never a measurement."""
        parts = ("total", "free", "self", "model", "context", "compute")
        devices = {
            name: dict.fromkeys(f"{part}_bytes" for part in parts) | {"self_bytes": size} for name, size in self.used.items()
        }
        rows = {row.device: {f"{part}_bytes": getattr(row, f"{part}_bytes") for part in parts} for row in self.rows}
        return {
            "devices": devices | rows,
            "projected_bytes": self.projected_bytes,
            "free_bytes": self.free_bytes,
            "target_bytes": self.target_bytes,
        }


class Unread(msgspec.Struct, frozen=True, kw_only=True):
    """Lines that speak of memory and were not understood: how many, and the first few."""

    count: int = 0
    samples: tuple[str, ...] = ()


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one vLLM worker (one GPU) logged; bytes."""

    name: str | None = None
    weights_bytes: int | None = None
    kv_available_bytes: int | None = None
    cuda_graph_bytes: int | None = None
    cuda_graph_estimated_bytes: int | None = None
    peak_activation_bytes: int | None = None
    non_torch_bytes: int | None = None
    consumed_bytes: int | None = None


class VllmFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The vLLM part of a load's facts. ``kv_cache_memory_bytes``: the size asked for, where it was asked for.

    ``arguments_logged``: the log names the options that were given, so that what it does not name had its default.
    ``graphs_share``: what an estimate of the CUDA graphs took of the utilisation, as a share of the GPU's total.
    """

    version: str | None = None
    workers: tuple[WorkerFacts, ...] = ()
    kv_tokens: int | None = None
    max_concurrency: float | None = None
    max_model_len: int | None = None
    num_gpu_blocks: int | None = None
    block_size: int | None = None
    requested_bytes: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    utilization: float | None = None
    dtype: str | None = None
    quantization: str | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    enforce_eager: bool | None = None
    max_num_seqs: int | None = None
    arguments_logged: bool = False
    graphs_share: float | None = None
    compiled: bool | None = None
    failure_class: str | None = None
    needed_bytes: int | None = None
    available_bytes: int | None = None
    kv_cache_memory_bytes: int | None = None
    estimated_max_model_len: int | None = None


class LoadFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One load, in the log's own words.

    ``context_cells`` counts the cells of the largest cache over all streams; ``num_batch`` is the physical batch
    (``n_ubatch``). ``layer_kinds`` has a letter a layer (``f`` attends to everything, ``w`` to a window, ``r`` is recurrent,
    ``b`` both, ``-`` neither), where the log is verbose enough to say. ``uncertainty_bytes`` is how far a figure may be off
    because the log rounds (Ollama's Go engine, whole MiB of a memory breakdown). ``overridden_tensors`` were put on the host by
    choice (``-ot``, ``--n-cpu-moe``). ``doubts`` say where the log contradicts itself, ``checked`` which checks agreed.
    ``wrapping`` names what stood around the lines. ``optional_bytes``: what would be free without the ``projector`` or the
    ``draft``, on all devices.
    """

    engine: EngineName
    dialect: Dialect
    model: str | None = None
    context_cells: int | None = None
    parallel: int | None = None
    layers_overflowing: int | None = None
    kv_cache_type: str | None = None
    flash_attention: Literal["enabled", "disabled"] | None = None
    num_batch: int | None = None
    layers_offloaded: int | None = None
    layers_total: int | None = None
    complete: bool = False
    failed: bool = False
    failure: str | None = None
    estimated: bool = False
    devices: dict[str, DeviceFacts] = {}
    sched_copies: int | None = None
    overridden_tensors: int | None = None
    doubts: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    optional_bytes: dict[str, int] = {}
    unread: Unread = Unread()
    wrapping: tuple[str, ...] = ()
    # Beyond the public JSON: what the fit needs.
    engine_version: str | None = None
    caches: tuple[CacheFacts, ...] = ()
    graph_splits: int | None = None
    train_context: int | None = None
    fit: FitFacts | None = None
    layer_kinds: str | None = None
    load_seconds: float | None = None
    uncertainty_bytes: int = 0
    vllm: VllmFacts | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether the engine makes its KV cache of the blocks that it is given room for, and names no buffers."""
        return self.vllm is not None

    @property
    def fully_offloaded(self) -> bool | None:
        """N of N layers on at least one GPU device, no KV or recurrent state on the host, nothing overflowing or overridden.

        Experts that lie on the host by choice show in the splits of the graph, two for each layer that has some.
        ``None`` where the log names no layer counts, or stops before it names devices, and nothing speaks against it.
        """
        if self.layers_overflowing or self.overridden_tensors or self._experts_on_host():
            return False
        if any(d.kind == "host" and (d.kv_cache_bytes or d.recurrent_bytes) for d in self.devices.values()):
            return False
        if self.layers_offloaded is not None and self.layers_offloaded != self.layers_total:
            return False
        if not any(device.kind == "gpu" for device in self.devices.values()):
            # Weights of the host are logged first: a log that ends there has not said where the rest went.
            sized = any(device.compute_bytes is not None for device in self.devices.values())
            return False if self.devices and (self.complete or sized) else None
        return None if self.layers_offloaded is None else True

    def _experts_on_host(self) -> bool:
        gpus = sum(device.kind == "gpu" for device in self.devices.values())
        host, weights = self.total("weights_bytes", "host") or 0, self.total("weights_bytes") or 0
        return self.graph_splits is not None and self.graph_splits > 2 * gpus + 4 and host * 4 > weights

    def total(self, part: str, kind: DeviceKind | None = None) -> int | None:
        """Sum of ``part`` (a field of ``DeviceFacts``) over the devices of ``kind``; ``None`` if no line was seen."""
        values = [
            value
            for device in self.devices.values()
            if (kind is None or device.kind == kind) and (value := getattr(device, part)) is not None
        ]
        return sum(values) if values else None

    @property
    def projection(self) -> dict[str, object] | None:
        """What the engine's fit projected, as ``parse --json`` shows it."""
        return None if self.fit is None else self.fit.to_json()

    def to_json(self) -> dict[str, object]:
        """The exact object of ``parse --json``'s ``data.loads[]``."""
        found = {name: msgspec.to_builtins(getattr(self, name)) for name in _SHOWN}
        if self.vllm is not None:
            found |= {name: msgspec.to_builtins(getattr(self.vllm, name)) for name in _SHOWN_OF_VLLM}
            found["workers"] = [{name: getattr(one, name) for name in _SHOWN_OF_WORKER} for one in self.vllm.workers]
        return found


#: What ``parse --json`` shows of a load, of one of vLLM and of its workers, in its order.
_SHOWN: Final = (
    *("engine", "dialect", "model", "context_cells", "parallel", "layers_overflowing", "kv_cache_type", "flash_attention"),
    *("num_batch", "layers_offloaded", "layers_total", "fully_offloaded", "complete", "failed", "failure", "estimated"),
    *("devices", "projection", "sched_copies", "overridden_tensors", "optional_bytes", "doubts", "checked", "unread"),
    "wrapping",
)
_SHOWN_OF_VLLM: Final = (
    *("version", "workers", "kv_tokens", "max_concurrency", "max_model_len", "failure_class", "needed_bytes"),
    "available_bytes",
)
_SHOWN_OF_WORKER: Final = ("weights_bytes", "kv_available_bytes", "cuda_graph_bytes")
