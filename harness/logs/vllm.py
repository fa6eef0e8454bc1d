"""vLLM's log, 0.6 to 0.33, V0 and V1, GPU and CPU: weights, KV cache and graphs of each worker, tokens, and failed starts.

Formats: vllm/worker/worker.py and executor_base.py (V0), vllm/v1/worker/{gpu_worker,gpu_model_runner,cpu_worker}.py,
vllm/v1/core/kv_cache_utils.py, vllm/entrypoints. What vLLM prints as "GB" is GiB too. Memory is by worker (one GPU), tokens
and concurrency by engine. Nothing is anchored at a line's start: collectors and vLLM itself put prefixes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from harness.logs import vllm_lines as say
from harness.logs.numbers import count, gib, number
from harness.logs.table import Row, ignored
from harness.logs.unwrap import Message
from harness.logs.vllm_building import LoggedStart, Speaker, Worker
from harness.logs.vllm_failures import HINTS, UNMISTAKABLE, classify, is_exception, is_secondary, unfinished
from harness.model.facts import LoadFacts

#: "(Worker_TP0 pid=228)", "(VllmWorker rank=1 pid=9)", "(EngineCore pid=7)"; they stack, and the last one is the speaker.
_PREFIX: Final = re.compile(
    r"\((?P<name>[A-Za-z][\w-]{0,60}(?: (?:rank=\d{1,4}|TP\d{1,4}))?) pid=(?P<pid>\d{1,10})(?:, ip=[^)]{0,60})?\) ?"
    r"|\((?P<bare>(?:Worker|EngineCore|APIServer)\w{0,60})\) "
)
_OURS: Final = re.compile(r"APIServer|ApiServer|EngineCore|Vllm|Worker|RayWorker|DPCoordinator")
#: The level, date and place in front of a message.
_HEAD: Final = re.compile(
    r"^.{0,200}?\b(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d{2}-\d{2} \d{2}:\d{2}:\d{2} "
    r"(?:\[[^\]]{0,120}\]|[\w./-]{1,120}:\d{1,6}\]) ?"
)
#: torchrun's prefix.
_RANK: Final = re.compile(r"^\[rank\d{1,4}\]: ")
_READY: Final = ("Application startup complete", "Starting vLLM API server", "Starting vLLM server on", "Uvicorn running on")


class VllmReader:
    """Takes lines of a vLLM log; :meth:`finish` gives its starts in their order."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self._done: list[tuple[int, LoadFacts]] = []
        self._start: LoggedStart | None = None
        self._ours = False
        self._wrapped: tuple[str, int] | None = None

    def finish(self) -> list[tuple[int, LoadFacts]]:
        """The starts with their numbers among the loads of the log."""
        self._close()
        return self._done

    # -- messages ---------------------------------------------------------------------------------------------------

    def continues(self, message: Message) -> bool:
        """Whether a message is the rest of one that was folded."""
        return self._wrapped is not None and self._unwrap(message.text)

    def named(self, _: Message) -> bool:
        """vLLM, or one of its processes, is named: what fails from now on may be its."""
        self._ours = True
        return False

    def take(self, handler: str, message: Message) -> bool:
        """Have one handler look at a message."""
        speaker, _ = _said_by(message)
        if handler == "weights":
            self._begin_if(self._weights_begin_another(speaker))
        worker = None
        if handler in ("weights", "summary", "graphs"):
            worker = self._open().worker(*speaker)
            self._open().cause = None if self._open().cause_is_guess else self._open().cause
        getattr(self, f"_{handler}")(message.text, speaker, worker)
        return True

    # -- starts -----------------------------------------------------------------------------------------------------

    def _open(self) -> LoggedStart:
        if self._start is None:
            self._start = LoggedStart(next(self._numbers))
        return self._start

    def _close(self) -> None:
        if self._start is not None and self._start.seen:
            self._done.append((self._start.number, self._start.facts()))
        self._start = None
        self._wrapped = None

    def _begin_if(self, another: bool) -> None:
        if another:
            self._close()

    def _weights_begin_another(self, speaker: Speaker) -> bool:
        """Every worker of an engine loads before its cache is sized; only engines of data parallelism overlap."""
        start = self._start
        if start is None:
            return False
        return (start.ended or start.sized) and not start.loads_beside(speaker)

    # -- what they say ----------------------------------------------------------------------------------------------

    def _weights(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        if worker is not None and (found := say.WEIGHTS.search(line)):
            worker.weights = _bytes(found[1])
            worker.weights_exact = True

    def _summary(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        start = self._open()
        if worker is None:
            return
        if found := say.AVAILABLE.search(line):
            worker.available = _bytes(next(value for value in found.groups() if value is not None))
            if "as specified" in found[0]:  # rounded; an option that is logged has every byte
                start.set("kv_cache_memory_bytes", str(worker.available), weak=True)
            if " set (" in found[0]:
                worker.kind = "host"
                start.total = _bytes(found[6])
        if (used := say.IN_USE.search(line)) and (used[1] or worker.available is None):
            worker.available = int(used[1]) if used[1] else _bytes(used[2])
        if summary := say.SUMMARY.search(line):
            start.free, start.total = _bytes(summary[1]), _bytes(summary[2])
            start.utilization, start.requested = number(summary[3]), _bytes(summary[4])
        if parts := say.PARTS.search(line):
            if parts["what"] == "weight":
                worker.guess_weights(_bytes(parts[1]))
            else:
                worker.consumed = _bytes(parts[1])
            worker.activation = _bytes(parts[3])
            worker.non_torch = _bytes(parts[4]) if parts[4] else worker.non_torch
            worker.graphs = _bytes(parts[5]) if worker.graphs is None else worker.graphs
        self._older_summary(line, worker, start)

    def _older_summary(self, line: str, worker: Worker, start: LoggedStart) -> None:
        if v0 := say.V0.search(line):
            worker.guess_weights(_bytes(v0[1]))
            worker.non_torch, worker.activation = _bytes(v0[2]), _bytes(v0[3])
        elif total := say.V0_TOTAL.search(line):
            start.total, start.utilization, start.requested = _bytes(total[1]), number(total[2]), _bytes(total[3])
        elif v06 := say.V06.search(line):
            start.total, start.utilization = _bytes(v06[1]), number(v06[4])
            worker.non_torch = _bytes(v06[3])
            if worker.weights is not None:
                worker.activation = max(_bytes(v06[2]) - worker.weights, 0)
        elif cpu := say.CPU_USE.search(line):
            start.requested, worker.consumed = _bytes(cpu[1]), _bytes(cpu[2])

    def _size(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        start = self._open()
        tokens, concurrency, blocks = say.TOKENS.search(line), say.CONCURRENCY.search(line), say.BLOCKS.search(line)
        if tokens:
            start.take_tokens(_count(tokens[1]))
        if concurrency:
            start.take_concurrency(_count(concurrency[1]), number(concurrency[2]))
        if blocks:
            if blocks["exact"]:
                start.blocks = int(blocks["exact"])
            else:
                start.take_v0_blocks(blocks["device"], int(blocks["blocks"]))

    def _graphs(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        if worker is None:
            return
        if found := say.GRAPHS.search(line):
            worker.graphs = _bytes(found[2])
        elif pool := say.POOL.search(line):
            worker.graphs = _bytes(pool[1])
            worker.estimate = _bytes(pool[2]) if pool[2] else worker.estimate
        elif estimate := say.ESTIMATE.search(line):
            worker.estimate = _bytes(estimate[1])
        elif shares := say.SHARES.search(line):
            start, share = self._open(), number(shares[1])
            start.utilization = start.utilization or share
            start.graphs_share = share - number(shares[2])

    def _engine(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        found = say.ENGINE.search(line)
        if found is None:
            return
        start = self._start
        if start is not None:
            self._begin_if((start.ended or start.loading) and not start.starts_beside(speaker))
        start = self._open()
        start.version = found["version"]
        start.loading = True
        start.engines.add(speaker)
        self._settings(line[found.end() :])

    def _api(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        if (found := say.API.search(line)) is not None:
            start = self._start
            version = (found["version"] or found["banner"]).rstrip(",")
            self._begin_if(start is not None and (start.ended or start.loading or start.announced))
            self._open().version = version
            self._open().announced = True
        elif model := say.BANNER_MODEL.search(line):
            self._open().set("model", model["model"], weak=True)

    def _config(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        if "args" in line:
            if self._start is not None and self._start.ended:
                self._close()
            self._settings(line)
            self._open().arguments = True
        elif length := say.MAX_LEN.search(line):
            self._open().max_model_len = int(length[1] or length[2])
        elif model := say.LOADING.search(line):
            self._begin_if(self._weights_begin_another(speaker))
            self._open().set("model", model["model"], weak=True)
        elif batched := say.BATCHED.search(line):
            self._open().set("max_num_batched_tokens", batched[1])
        elif size := say.BLOCK_SIZE.search(line):
            self._open().set("block_size", size[1])
        elif kind := say.RESOLVED.search(line):
            if self._open().settings.get("kv_cache_dtype", "auto") == "auto":  # the model's own files chose it
                self._open().set("kv_cache_dtype", {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8_e5m2"}.get(kind[1], kind[1]))
        elif self._start is not None:
            self._start.flash = "enabled"

    def _settings(self, text: str) -> None:
        start, seen = self._open(), set()
        for found in say.SETTING.finditer(text):
            key = found["key"]
            if key not in seen:  # nested configurations repeat keys further right
                seen.add(key)
                start.set(key, found["value"].strip("'\""))

    def _compiled(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        self._open().compiled = True

    def _ready(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        if self._start is not None:
            self._start.initialised = True
            if self._start.cause_is_guess:
                self._start.cause = None
            self._start.serving = self._start.serving or any(ready in line for ready in _READY)

    # -- failures ---------------------------------------------------------------------------------------------------

    def failed(self, message: Message) -> bool:
        """Look for the cause of a failed start."""
        _, level = _said_by(message)
        text = message.text
        for prefix in _PREFIX.finditer(text):
            text = text[prefix.end() :]
        if head := _HEAD.match(text):
            level, text = head["level"], text[head.end() :]
        text = _RANK.sub("", text.strip())
        start = self._start
        if start is not None and start.up:
            return True  # what happens to requests is no failed start
        if level in ("INFO", "WARNING", "DEBUG"):
            return False
        failure = classify(text)
        if (
            not self._ours
            and start is None
            and not _OURS.search(message.text)
            and (failure is None or failure.kind not in UNMISTAKABLE)
        ):
            return False
        if is_secondary(text):
            self._open().broken = True
        elif failure is not None:
            start = self._open()
            if start.cause is None or start.cause_is_guess:
                start.cause, start.cause_is_guess = failure, False
                self._wrapped = (text, 3) if unfinished(failure) else None
        elif start is not None and is_exception(text) and start.cause is None:
            start.guess(text)
        elif start is not None and text.startswith("Value error, ") and start.cause_is_guess:
            start.guess(text.removeprefix("Value error, "))  # pydantic's line before it says only that something is wrong
        else:
            return False
        return True

    def _unwrap(self, line: str) -> bool:
        """Whether a line is the rest of a message that a terminal has wrapped: it has no prefix of its own."""
        if self._wrapped is None or self._start is None or _PREFIX.search(line) or _HEAD.match(line):
            self._wrapped = None
            return False
        text, left = self._wrapped
        joined = text + (" " if text.endswith((",", ".", ";")) else "") + line.strip("\n")
        failure = classify(joined)
        if failure is not None:
            self._start.cause = failure
        more = failure is not None and unfinished(failure) and left > 1
        self._wrapped = (joined, left - 1) if more else None
        return True


def _said_by(message: Message) -> tuple[Speaker, str]:
    """The process that wrote a message, and the level of its record: vLLM's prefix, or the fields of its JSON formatter."""
    name, pid = "", ""
    for prefix in _PREFIX.finditer(message.text):
        name, pid = prefix["name"] or prefix["bare"], prefix["pid"] or ""
    level = ""
    if message.fields and ("processName" in message.fields or "vllm_process_name" in message.fields):
        said = message.fields.get("vllm_process_name") or message.fields.get("processName")
        name, level = "" if said == "MainProcess" else str(said), str(message.fields.get("levelname", ""))
        pid = str(message.fields.get("process", ""))
    return ((name, pid) if name else ("", "")), level


def _take(handler: str) -> Callable[[VllmReader, Message], bool]:
    return lambda reader, message: reader.take(handler, message)


_HANDLERS: Final = {
    name: _take(name) for name in ("weights", "summary", "size", "graphs", "engine", "api", "config", "compiled", "ready")
}

#: Every kind of message of vLLM that is looked at; releases of vLLM.
TABLE: Final = (
    *(
        Row(sign, _HANDLERS[handler], source, "vllm")
        for handler, sign, source in (
            ("weights", "Model loading took", "vllm/v1/worker/gpu_model_runner.py, since 0.8.0"),
            ("weights", "Loading model weights took", "vllm/worker/model_runner.py, until 0.7.3"),
            ("summary", "Available KV cache memory", "vllm/v1/worker/gpu_worker.py, since 0.9.1"),
            ("summary", "Actual usage is", "vllm/v1/worker/gpu_worker.py, 0.10.2, since 0.26"),
            ("summary", "kv cache memory in use", "vllm/v1/worker/gpu_worker.py, since 0.10.2"),
            ("summary", "reserved for KV Cache", "vllm/worker/worker.py, 0.6.5 to 0.8"),
            ("summary", "GiB for KV cache", "vllm/v1/worker/cpu_worker.py, since 0.20"),
            ("summary", "GiB memory for KV Cache", "vllm/v1/worker/gpu_worker.py, since 0.10.2"),
            ("summary", "total_gpu_memory", "vllm/worker/worker.py, 0.6.4 to 0.8"),
            ("summary", "total_hbm_avail_gb", "tpu_inference/worker/tpu_worker.py, since 0.11"),
            ("size", "KV cache size: ", "vllm/v1/core/kv_cache_utils.py, since 0.8.0"),
            ("size", "Maximum concurrency for", "vllm/v1/core/kv_cache_utils.py, since 0.6.5"),
            ("size", " blocks: ", "vllm/executor/executor_base.py, until 0.8"),
            ("size", "num_gpu_blocks is: ", "vllm/v1/engine/core.py, since 0.9"),
            ("graphs", "Graph capturing finished", "vllm/v1/worker/gpu_model_runner.py, since 0.6"),
            ("graphs", "CUDA graph memory", "vllm/v1/worker/gpu_worker.py, since 0.18"),
            ("graphs", "CUDA graph pool memory", "vllm/v1/worker/gpu_worker.py, since 0.18"),
            ("engine", "LLM engine (v", "vllm/engine/llm_engine.py, v1/engine/core.py, since 0.2"),
            ("api", "API server version ", "vllm/entrypoints/openai/api_server.py, since 0.2"),
            ("api", "█ ", "vllm/entrypoints/utils.py, since 0.14; progress bars hold it too"),
            ("config", "non-default args", "vllm/entrypoints/openai/api_server.py, since 0.9"),
            ("config", "args: Namespace(", "vllm/entrypoints/openai/api_server.py, until 0.10"),
            ("config", "Using max model len", "vllm/config, since 0.8"),
            ("config", "Auto-fit max_model_len", "vllm/v1/core/kv_cache_utils.py, since 0.14"),
            ("config", "Setting attention block size", "vllm/model_executor/models/config.py, since 0.10"),
            ("config", "Chunked prefill is enabled", "vllm/config, since 0.6"),
            ("config", "Starting to load model", "vllm/v1/worker/gpu_model_runner.py, since 0.6"),
            ("config", "resolved query dtypes", "vllm/v1/attention/backends/flashinfer.py, since 0.25"),
            ("config", "Using Flash Attention backend", "vllm/platforms/cuda.py, 0.6 to 0.10"),
            ("config", "Using FlashAttention version", "vllm/attention/backends, since 0.13"),
            ("config", "Using FLASH_ATTN", "vllm/platforms/cuda.py, since 0.11"),
            ("config", "Using AttentionBackendEnum.FLASH_ATTN ", "vllm/platforms/cuda.py, since 0.14"),
            ("compiled", "Compiling a graph for", "vllm/compilation/backends.py, since 0.7"),
            ("compiled", "Cache the graph of shape", "vllm/compilation/backends.py, since 0.8"),
            ("ready", "init engine (", "vllm/v1/engine/core.py, since 0.6"),
            *(("ready", sign, "uvicorn; vllm/entrypoints/openai/api_server.py, since 0.2") for sign in _READY),
        )
    ),
    *(Row(sign, VllmReader.named, "every release", "vllm") for sign in ("vllm", "vLLM")),
    *(Row(sign, VllmReader.failed, "vllm_failures.py", "vllm", "failure") for sign in HINTS),
    *(
        Row(sign, ignored, "of no load", "vllm", "noise")
        for sign in ("Loading weights took", "Sleep mode", "It took", "CPU offload", "Memory usage", "offloading")
    ),
)  # fmt: skip


def _bytes(text: str) -> int:
    return gib(text)


def _count(text: str) -> int:
    return count(text)
