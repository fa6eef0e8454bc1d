"""vLLM's log, 0.6 to 0.33, V0 and V1, GPU and CPU: weights, KV cache and graphs of each worker, tokens, and failed starts.

Formats: vllm/worker/worker.py and executor_base.py (V0), vllm/v1/worker/{gpu_worker,gpu_model_runner,cpu_worker}.py,
vllm/v1/core/kv_cache_utils.py, vllm/entrypoints. What vLLM prints as "GB" is GiB too. Memory is by worker (one GPU), tokens
and concurrency by engine. Nothing is anchored at a line's start: collectors and vLLM itself put prefixes there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from harness.logs import vllm_lines as say
from harness.logs.vllm_building import Speaker, Start, Worker
from harness.logs.vllm_failures import HINTS, classify, is_exception, is_secondary, unfinished
from harness.model.facts import LoadFacts
from harness.units import GIB

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

#: Which reading a line needs, by the first of these that it holds; plain searches cost a tenth of one regex.
_KEYS: Final = (
    ("Model loading took", "weights"),
    ("Loading model weights took", "weights"),
    ("Available KV cache memory", "summary"),
    ("Actual usage is", "summary"),
    ("kv cache memory in use", "summary"),
    ("reserved for KV Cache", "summary"),
    ("GiB for KV cache", "summary"),
    ("GiB memory for KV Cache", "summary"),
    ("total_gpu_memory", "summary"),
    ("KV cache size: ", "size"),
    ("Maximum concurrency for", "size"),
    (" blocks: ", "size"),
    ("num_gpu_blocks is: ", "size"),
    ("Graph capturing finished", "graphs"),
    ("CUDA graph memory", "graphs"),
    ("CUDA graph pool memory", "graphs"),
    ("LLM engine (v", "engine"),
    ("API server version ", "api"),
    ("non-default args", "config"),
    ("args: Namespace(", "config"),
    ("Using max model len", "config"),
    ("Auto-fit max_model_len", "config"),
    ("Setting attention block size", "config"),
    ("Chunked prefill is enabled", "config"),
    ("Starting to load model", "config"),
    ("Using Flash Attention backend", "config"),
    ("Using FlashAttention version", "config"),
    ("Using FLASH_ATTN", "config"),
    ("Using AttentionBackendEnum.FLASH_ATTN ", "config"),
    ("Compiling a graph for", "compiled"),
    ("Cache the graph of shape", "compiled"),
    ("init engine (", "ready"),
    *((words, "ready") for words in _READY),
    ("█ ", "api"),  # of the banner; progress bars hold it too, sometimes in front of another line
)


class VllmReader:
    """Takes lines of a vLLM log; :meth:`finish` gives its starts in their order."""

    def __init__(self) -> None:
        self._done: list[LoadFacts] = []
        self._start: Start | None = None
        self._ours = False
        self._wrapped: tuple[str, int] | None = None
        self._handlers: dict[str, Callable[[str, Speaker, Worker | None], None]] = {
            "weights": self._weights,
            "summary": self._summary,
            "size": self._size,
            "graphs": self._graphs,
            "engine": self._engine,
            "api": self._api,
            "config": self._config,
            "compiled": self._compiled,
            "ready": self._ready,
        }

    def feed_line(self, line: str) -> None:
        """Look at one line."""
        name, pid = "", ""
        if "(" in line or "{" in line:
            if '"message"' in line and (start := line.find("{")) >= 0 and self._json(line[start:]):
                return
            for prefix in _PREFIX.finditer(line):
                name, pid = prefix["name"] or prefix["bare"], prefix["pid"] or ""
        self._message(line, name, pid)

    def finish(self) -> list[LoadFacts]:
        """The starts told of."""
        self._close()
        done, self._done = self._done, []
        return done

    # -- lines ------------------------------------------------------------------------------------------------------

    def _json(self, text: str) -> bool:
        """A line of a JSON formatter: ``{"message": …, "vllm_process_name": …, "process": …}``."""
        try:
            record: Any = json.loads(text)
            message = record["message"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        if not isinstance(message, str):
            return False
        name = record.get("vllm_process_name") or record.get("processName") or ""
        speaker = "" if name == "MainProcess" else str(name)
        for line in message.splitlines():
            self._message(line, speaker, str(record.get("process", "")), str(record.get("levelname", "")))
        return True

    def _message(self, line: str, name: str, pid: str, level: str = "") -> None:
        if not self._ours and (_OURS.search(name) or "vllm" in line or "vLLM" in line):
            self._ours = True
        if self._wrapped is not None and self._unwrap(line):
            return
        for words, handler in _KEYS:
            if words in line:
                self._handle(handler, line, (name, pid) if name else ("", ""))
                break
        if any(word in line for word in HINTS):
            self._failure(line, level)

    def _handle(self, handler: str, line: str, speaker: Speaker) -> None:
        if handler == "weights":
            self._begin_if(self._weights_begin_another(speaker))
        worker = None
        if handler in ("weights", "summary", "graphs"):
            worker = self._open().worker(*speaker)
            self._open().cause = None if self._open().cause_is_guess else self._open().cause
        self._handlers[handler](line, speaker, worker)

    # -- starts -----------------------------------------------------------------------------------------------------

    def _open(self) -> Start:
        if self._start is None:
            self._start = Start()
        return self._start

    def _close(self) -> None:
        if self._start is not None and self._start.seen:
            self._done.append(self._start.facts())
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
            if " set (" in found[0]:
                worker.kind = "host"
                start.total = _bytes(found[6])
        if (used := say.IN_USE.search(line)) and (used[1] or worker.available is None):
            worker.available = int(used[1]) if used[1] else _bytes(used[2])
        if summary := say.SUMMARY.search(line):
            start.free, start.total = _bytes(summary[1]), _bytes(summary[2])
            start.utilization, start.requested = float(summary[3]), _bytes(summary[4])
        if parts := say.PARTS.search(line):
            if parts["what"] == "weight":
                worker.guess_weights(_bytes(parts[1]))
            else:
                worker.consumed = _bytes(parts[1])
            worker.activation = _bytes(parts[3])
            worker.non_torch = _bytes(parts[4]) if parts[4] else worker.non_torch
            worker.graphs = _bytes(parts[5]) if worker.graphs is None else worker.graphs
        self._older_summary(line, worker, start)

    def _older_summary(self, line: str, worker: Worker, start: Start) -> None:
        if v0 := say.V0.search(line):
            worker.guess_weights(_bytes(v0[1]))
            worker.non_torch, worker.activation = _bytes(v0[2]), _bytes(v0[3])
        elif total := say.V0_TOTAL.search(line):
            start.total, start.utilization, start.requested = _bytes(total[1]), float(total[2]), _bytes(total[3])
        elif v06 := say.V06.search(line):
            start.total, start.utilization = _bytes(v06[1]), float(v06[3])
            worker.non_torch = _bytes(v06[2])
        elif cpu := say.CPU_USE.search(line):
            start.requested, worker.consumed = _bytes(cpu[1]), _bytes(cpu[2])

    def _size(self, line: str, speaker: Speaker, worker: Worker | None) -> None:
        start = self._open()
        tokens, concurrency, blocks = say.TOKENS.search(line), say.CONCURRENCY.search(line), say.BLOCKS.search(line)
        if tokens:
            start.take_tokens(_count(tokens[1]))
        if concurrency:
            start.take_concurrency(_count(concurrency[1]), float(concurrency[2]))
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
        elif length := say.MAX_LEN.search(line):
            self._open().max_model_len = int(length[1] or length[2])
        elif model := say.LOADING.search(line):
            self._begin_if(self._weights_begin_another(speaker))
            self._open().set("model", model["model"], weak=True)
        elif batched := say.BATCHED.search(line):
            self._open().set("max_num_batched_tokens", batched[1])
        elif size := say.BLOCK_SIZE.search(line):
            self._open().set("block_size", size[1])
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

    def _failure(self, line: str, level: str) -> None:
        text = line
        for prefix in _PREFIX.finditer(line):
            text = line[prefix.end() :]
        if head := _HEAD.match(text):
            level, text = head["level"], text[head.end() :]
        text = _RANK.sub("", text.strip())
        if not self._ours or level in ("INFO", "WARNING", "DEBUG"):
            return
        start = self._start
        if start is not None and start.up:
            return  # what happens to requests is no failed start
        if is_secondary(text):
            self._open().broken = True
        elif (failure := classify(text)) is not None:
            start = self._open()
            if start.cause is None or start.cause_is_guess:
                start.cause, start.cause_is_guess = failure, False
                self._wrapped = (text, 3) if unfinished(failure) else None
        elif start is not None and is_exception(text) and start.cause is None:
            start.guess(text)
        elif start is not None and text.startswith("Value error, ") and start.cause_is_guess:
            start.guess(text.removeprefix("Value error, "))  # pydantic's line before it says only that something is wrong

    def _unwrap(self, line: str) -> bool:
        """Whether a line is the rest of a message that a terminal has wrapped: it has no prefix of its own."""
        if self._wrapped is None or self._start is None or _PREFIX.search(line) or _HEAD.match(line):
            self._wrapped = None
            return False
        text, left = self._wrapped
        joined = text + line.strip("\n")
        failure = classify(joined)
        if failure is not None:
            self._start.cause = failure
        more = failure is not None and unfinished(failure) and left > 1
        self._wrapped = (joined, left - 1) if more else None
        return True


def _bytes(gib: str) -> int:
    return round(float(gib) * GIB)


def _count(text: str) -> int:
    return int(text.replace(",", ""))
