"""One start of vLLM while its lines are still coming."""

from __future__ import annotations

import re
from typing import Final, Literal

from harness.logs.vllm_failures import Failure
from harness.model.facts import DeviceFacts, LoadFacts, VllmFacts, WorkerFacts
from harness.units import GIB

#: KV blocks of V0, tokens, where the log does not give them away (vllm/config.py, CacheConfig, 0.6 to 0.8).
_V0_BLOCK_SIZE: Final = {"gpu": 16, "cuda": 16, "rocm": 16}
#: Half of the last decimal of GiB.
_ROUNDING: Final = GIB // 200
_BLOCK_SIZES: Final = (8, 16, 32, 64, 128, 256)
_ENGINE_INDEX: Final = re.compile(r"(?:EngineCore_(?:DP)?|_DP)(\d{1,4})")
_RANK: Final = re.compile(r"(DP|PP|TP|EP|rank=)(\d{1,4})")


#: Name and PID of a process, empty where a line does not say.
Speaker = tuple[str, str]


class Worker:
    """One worker: one GPU, or a CPU. Bytes."""

    def __init__(self, name: str, pid: str) -> None:
        self.name, self.pid = name, pid
        self.kind: Literal["gpu", "host"] = "gpu"
        self.weights: int | None = None
        self.weights_exact = False
        self.available: int | None = None
        self.graphs: int | None = None
        self.estimate: int | None = None
        self.activation: int | None = None
        self.non_torch: int | None = None
        self.consumed: int | None = None

    def guess_weights(self, size: int) -> None:
        """Weights of a summary, which are rounded further than those of the line of their own."""
        if not self.weights_exact:
            self.weights = size

    @property
    def order(self) -> tuple[int, ...]:
        """Rank by rank: data, pipeline, tensor parallel; a worker without a name is V0's rank 0."""
        if not self.name:
            return (-1,)
        ranks = {key: int(value) for key, value in _RANK.findall(self.name)}
        places = tuple(ranks.get(key, 0) for key in ("DP", "PP", "TP", "EP", "rank="))
        return (*places, int(self.pid) if self.pid.isdigit() else 0)

    def facts(self) -> WorkerFacts:
        """The worker as it stands."""
        return WorkerFacts(
            name=self.name or None,
            weights_bytes=self.weights,
            kv_available_bytes=self.available,
            cuda_graph_bytes=self.graphs,
            cuda_graph_estimated_bytes=self.estimate,
            peak_activation_bytes=self.activation,
            non_torch_bytes=self.non_torch,
            consumed_bytes=self.consumed,
        )


class LoggedStart:
    """Collects one start; :meth:`facts` freezes it."""

    def __init__(self, number: int = 0) -> None:
        self.number = number  # among the loads of the log
        self.version: str | None = None
        self.settings: dict[str, str] = {}
        self.arguments = False  # those that differ from the defaults were printed
        self.weak: set[str] = set()
        self.workers: dict[tuple[str, str], Worker] = {}
        self.engines: set[Speaker] = set()
        self.max_model_len: int | None = None
        self.tokens: int | None = None
        self.concurrency: tuple[int, float] | None = None
        self.blocks: int | None = None
        self.v0_blocks: tuple[str, int] | None = None
        self.free: int | None = None
        self.total: int | None = None
        self.utilization: float | None = None
        self.graphs_share: float | None = None
        self.requested: int | None = None
        self.flash: Literal["enabled"] | None = None
        self.compiled: bool | None = None
        self.cause: Failure | None = None
        self.cause_is_guess = False
        self.announced = self.loading = self.initialised = self.serving = self.broken = False

    @property
    def seen(self) -> bool:
        """Whether anything was said of a model."""
        return bool(self.workers or self.loading or self.announced or self.sized or self.cause or self.broken)

    @property
    def sized(self) -> bool:
        """Whether the KV cache has its size."""
        return self.tokens is not None or self.v0_blocks is not None or self.blocks is not None

    @property
    def ended(self) -> bool:
        """Whether the start has come to its end, good or bad."""
        failed = self.cause is not None and not self.cause_is_guess
        return self.initialised or self.serving or self.broken or failed

    def loads_beside(self, speaker: Speaker) -> bool:
        """Whether weights come from an engine of data parallelism beside others that are ready already."""
        each = (self.whole("tensor_parallel_size") or 1) * (self.whole("pipeline_parallel_size") or 1)
        known = len(self.workers) < self._engines * each and (speaker[1] or "", "") not in self.workers
        return self._is_another(speaker[0], known, [worker.name for worker in self.workers.values()])

    def starts_beside(self, speaker: Speaker) -> bool:
        """Whether an engine of data parallelism begins beside others."""
        known = len(self.engines) < self._engines and speaker not in self.engines
        return self._is_another(speaker[0], known, [name for name, _ in self.engines])

    @property
    def _engines(self) -> int:
        return self.whole("data_parallel_size") or 1

    def _is_another(self, name: str, counted: bool, names: list[str]) -> bool:
        """By their number where the configuration gives it, else by the index in their names."""
        if self.serving or self.broken:
            return False
        index = _ENGINE_INDEX.search(name)
        indices = {found[1] for one in names if (found := _ENGINE_INDEX.search(one))}
        return (counted and self._engines > 1) or (index is not None and bool(indices) and index[1] not in indices)

    @property
    def up(self) -> bool:
        """Whether it serves; where no API server was announced (``vllm.LLM`` in a script), the engine is all there is."""
        return self.serving or (self.initialised and not self.announced and not self.broken)

    def worker(self, name: str, pid: str) -> Worker:
        """The worker of a process; it may get its rank's name only after its first lines."""
        key = (pid, "") if pid else ("", name)
        if key not in self.workers:
            self.workers[key] = Worker(name, pid)
        elif len(name) > len(self.workers[key].name):
            self.workers[key].name = name
        return self.workers[key]

    def set(self, key: str, value: str, *, weak: bool = False) -> None:
        """A setting as logged; a weak one gives way to another."""
        key = {"model_tag": "model", "max_seq_len": "max_model_len"}.get(key, key)
        if value in ("None", "") or (weak and key in self.settings):
            return
        if key == "max_model_len" and (length := _whole(value)) is not None and length > 0:
            self.max_model_len = length
        if key == "model" and key in self.settings and key not in self.weak:
            return  # the first configuration names the model as it was asked for
        self.weak = self.weak | {key} if weak else self.weak - {key}
        self.settings[key] = value

    def take_tokens(self, tokens: int) -> None:
        """Tokens of the cache; printed by each worker up to 0.11, and the smallest of them holds for the engine."""
        if not self.ended or self.tokens is None:
            self.tokens = tokens if self.tokens is None else min(self.tokens, tokens)

    def take_concurrency(self, length: int, times: float) -> None:
        """Requests of ``length`` tokens that fit at once."""
        self.max_model_len = length
        if self.concurrency is None or self.concurrency[0] != length:
            self.concurrency = (length, times)
        else:
            self.concurrency = (length, min(self.concurrency[1], times))

    def take_v0_blocks(self, device: str, blocks: int) -> None:
        """Blocks of V0 on its device; the swap space that follows on the line is no part of it."""
        self.v0_blocks = (device.lower(), blocks)

    def guess(self, text: str) -> None:
        """An exception that no class knows: the cause, unless the start goes on."""
        self.cause, self.cause_is_guess = Failure(kind="other", text=text[:600]), True

    def whole(self, key: str) -> int | None:
        """A setting that is a number."""
        return _whole(self.settings.get(key, ""))

    def _dense_size(self) -> int | None:
        """Tokens of a block of V1, which names blocks at DEBUG alone; ``None`` for hybrids, whose tokens are of many groups."""
        if not self.tokens or not self.blocks or self.tokens % self.blocks or self.concurrency is None:
            return None
        size = self.tokens // self.blocks
        length, times = self.concurrency
        return size if length and abs(self.blocks / -(-length // size) - times) < 0.0051 else None

    def _v0_size(self) -> tuple[int | None, int | None]:
        """Tokens and block size of V0: the concurrency tells the block's size, which the log does not name."""
        if self.v0_blocks is None:
            return self.tokens, self.whole("block_size") or self._dense_size()
        device, blocks = self.v0_blocks
        size = self.whole("block_size")
        if size is None and self.concurrency is not None and blocks:
            length, times = self.concurrency
            about = times * length / blocks
            nearest = min(_BLOCK_SIZES, key=lambda one: abs(one - about))
            size = nearest if abs(nearest - about) < 0.1 * nearest else None
        size = size or _V0_BLOCK_SIZE.get(device)
        return (None if size is None else blocks * size), size

    def facts(self) -> LoadFacts:
        """The start as it stands."""
        tokens, block_size = self._v0_size()
        tokens = self.tokens if self.tokens is not None else tokens
        failed = not self.up and (self.broken or self.cause is not None)
        cause = self.cause if failed else None
        workers = sorted(self.workers.values(), key=lambda worker: worker.order)
        asked = self.whole("kv_cache_memory_bytes")
        for worker in workers:
            if asked is not None and worker.available is not None and abs(worker.available - asked) <= _ROUNDING:
                worker.available = asked  # asked for in bytes; the worker's own line rounds it
        kv_type = self.settings.get("kv_cache_dtype")
        dtype = self.settings.get("dtype", "").removeprefix("torch.")
        quantization = self.settings.get("quantization")
        return LoadFacts(
            engine="vllm",
            dialect="vllm",
            model=self.settings.get("model"),
            context_cells=tokens,
            kv_cache_type=(dtype if dtype != "auto" else None) or None if kv_type in (None, "auto") else kv_type,
            flash_attention=self.flash,
            num_batch=self.whole("max_num_batched_tokens"),
            complete=(self.initialised or self.serving) and not failed,
            failed=failed,
            failure=_sentence(cause) if failed else None,
            devices=_devices(workers),
            engine_version=self.version,
            vllm=VllmFacts(
                version=self.version,
                workers=tuple(worker.facts() for worker in workers),
                kv_tokens=tokens,
                max_concurrency=None if self.concurrency is None else self.concurrency[1],
                max_model_len=self.max_model_len or (cause.max_model_len if cause else None),
                num_gpu_blocks=self.blocks if self.blocks is not None else (self.v0_blocks[1] if self.v0_blocks else None),
                block_size=block_size,
                requested_bytes=self.requested or (cause.requested_bytes if cause else None),
                total_bytes=self.total or (cause.total_bytes if cause else None),
                free_bytes=self.free or (cause.free_bytes if cause else None),
                utilization=self.utilization
                or (cause.utilization if cause else None)
                or _fraction(self.settings.get("gpu_memory_utilization", "")),
                dtype=dtype or None,
                quantization=quantization,
                tensor_parallel=self.whole("tensor_parallel_size"),
                pipeline_parallel=self.whole("pipeline_parallel_size"),
                enforce_eager={"True": True, "False": False}.get(self.settings.get("enforce_eager", "")),
                max_num_seqs=self.whole("max_num_seqs"),
                arguments_logged=self.arguments,
                graphs_share=self.graphs_share,
                compiled=self.compiled,
                failure_class=cause.kind if cause else ("other" if failed else None),
                kv_cache_memory_bytes=asked,
                needed_bytes=cause.needed_bytes if cause else None,
                available_bytes=cause.available_bytes if cause else None,
                estimated_max_model_len=cause.estimated_max_model_len if cause else None,
            ),
        )


def _devices(workers: list[Worker]) -> dict[str, DeviceFacts]:
    """What each GPU holds, numbered by rank; the CPU's worker is the host."""
    devices = {}
    for index, worker in enumerate(workers):
        name = "CPU" if worker.kind == "host" else f"GPU{index}"
        if worker.weights is None and worker.available is None and worker.activation is None:
            continue
        devices[name] = DeviceFacts(
            kind=worker.kind,
            weights_bytes=worker.weights,
            kv_cache_bytes=worker.available,
            compute_bytes=worker.activation,
        )
    return devices


def _sentence(cause: Failure | None) -> str:
    if cause is None:
        return "the engine did not start; its log does not say why"
    words = {
        "kv_too_small": "KV cache too small",
        "no_memory_for_cache": "no memory left for the KV cache",
        "free_below_utilization": "free memory below the utilization asked for",
        "memory_moved": "other processes changed the GPU's memory during profiling",
        "out_of_memory": "out of memory",
        "gated": "gated model",
        "not_found": "model not found",
        "unsupported": "not supported",
        "context_too_long": "context longer than the model allows",
    }
    word = words.get(cause.kind)
    return cause.text if word is None else f"{word}: {cause.text}"


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


def _fraction(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[01](?:\.\d{1,17})?", text) else None
