"""A stand-in for ``vllm serve`` on a CPU: its log, its check of the KV cache, its endpoints. Standard library only.

``STAND_IN`` in the environment holds JSON that changes the machine (:data:`MACHINE`) or asks for a failure (``mode``). The
memory of the cache is really taken, so that a meter sees it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MIB = 1 << 20
GIB = 1 << 30
#: Bytes and tokens. ``fixed`` and ``groups`` are blocks of a sequence, as in a hybrid model.
MACHINE: dict[str, Any] = {
    "version": "0.32.0",
    "total": 512 * MIB,
    "free": 480 * MIB,
    "consumed": 40 * MIB,
    "block_size": 128,
    "block_bytes": 512 * 1024,
    "groups": 1,
    "fixed": 0,
    "model_context": 32768,
    "mode": "",
}
MACHINE |= json.loads(os.environ.get("STAND_IN", "{}"))
MODE = MACHINE["mode"]
NAMES = {"api": "(APIServer pid=1)", "core": "(EngineCore pid=2)", "worker": "(Worker pid=3)"}


def say(who: str, text: str, level: str = "INFO") -> None:
    sys.stdout.write(f"{NAMES[who]} {level} 11-25 10:00:00 [core.py:1] {text}\n")
    sys.stdout.flush()


def end(cause: str, *, bare: bool = False) -> None:
    """Print a root cause and the generic line after it, and end as vLLM does."""
    if bare:
        sys.stderr.write(f"Traceback (most recent call last):\n{cause}\n")
    else:
        say("core", "EngineCore failed to start.", "ERROR")
        say("core", cause, "ERROR")
        sys.stderr.write(
            f"{NAMES['api']} RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}\n"
        )
    sys.exit(1)


def gib(size: float) -> str:
    return str(round(size / GIB, 2))


def options(words: list[str]) -> dict[str, str]:
    found, index = {"model": words[1] if words[:1] == ["serve"] else ""}, 0
    while index < len(words):
        if words[index].startswith("--"):
            value = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else ""
            found[words[index][2:]] = value
        index += 1
    return found


def check(given: dict[str, str]) -> int:
    """The blocks of the cache, or the end; vllm/v1/worker/cpu_worker.py and vllm/v1/core/kv_cache_utils.py."""
    context, total = int(given["max-model-len"]), MACHINE["total"]
    share = float(given.get("gpu-memory-utilization", 0.92))
    if context > MACHINE["model_context"]:
        end(
            f"  Value error, User-specified max_model_len ({context}) is greater than the derived max_model_len "
            f"(max_position_embeddings={MACHINE['model_context']})",
            bare=True,
        )
    if "kv-cache-memory-bytes" in given:
        available = int(given["kv-cache-memory-bytes"])
        say("worker", f"Explicitly set ({gib(available)}/{gib(total)}) GiB for KV cache on node 0.")
    else:
        requested = math.ceil(total * share)
        if requested > MACHINE["free"]:
            end(
                f"ValueError: Available memory on node 0 ({gib(MACHINE['free'])}/{gib(total)} GiB) on startup is less than "
                f"desired CPU memory utilization ({share}, {gib(requested)} GiB). Decrease it."
            )
        available = requested - MACHINE["consumed"]
        say(
            "worker",
            f"Auto set ({gib(available)}/{gib(total)}) GiB for KV cache on node 0, with {gib(requested)} GiB requested memory "
            f"for the worker. {gib(MACHINE['consumed'])} GiB memory was consumed by non-kv usages.",
        )
    number = available // MACHINE["block_bytes"]
    if number <= 0:
        end("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")
    if of_sequence(context) > number - 1:
        longest = max((number - 1 - MACHINE["fixed"]) // MACHINE["groups"], 0) * MACHINE["block_size"]
        end(
            f"ValueError: To serve at least one request with the model's max seq len ({context}), "
            f"({gib(of_sequence(context) * MACHINE['block_bytes'])} GiB KV cache is needed, which is larger than the available "
            f"KV cache memory ({gib(available)} GiB). Based on the available memory, the estimated maximum model length is "
            f"{longest}."
        )
    times = number / of_sequence(context)
    say(
        "core",
        f"CPU KV cache size: {int(times * context):,} tokens, Maximum concurrency for {context:,} tokens per request: "
        f"{times:.2f}x",
    )
    return int(number)


def of_sequence(context: int) -> int:
    return int(MACHINE["fixed"] + MACHINE["groups"] * -(-context // MACHINE["block_size"]))


class Answers(BaseHTTPRequestHandler):
    context = 0
    blocks = 0
    model = ""

    def do_GET(self) -> None:
        body = {
            "/health": "",
            "/version": json.dumps({"version": MACHINE["version"]}),
            "/v1/models": json.dumps({"data": [{"id": self.model, "max_model_len": self.context}]}),
            "/metrics": (
                f'vllm:cache_config_info{{block_size="{MACHINE["block_size"]}",num_gpu_blocks="{self.blocks}",'
                f'kv_cache_max_concurrency="{self.blocks / of_sequence(self.context)}",engine="0"}} 1.0\n'
            ),
        }[self.path]
        self.answer(body.encode())
        if MODE == "dies when ready":
            os._exit(1)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if MODE == "dies at the first prompt":
            say("core", "EngineCore encountered a fatal error.", "ERROR")
            os._exit(1)
        pieces = [f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n" for _ in range(request["max_tokens"])]
        self.answer("".join([*pieces, "data: [DONE]\n\n"]).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main(words: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    given = options(words)
    say("api", f"█▄█▀ █  version {MACHINE['version']}")
    say("api", f"non-default args: { ({key: value for key, value in given.items() if key != 'model'}) }")
    token = os.environ.get("HF_TOKEN_PATH")
    if token is not None:
        say("api", f"token file of {len(Path(token).read_text())} characters, mode {oct(Path(token).stat().st_mode & 0o777)}")
    if "HF_TOKEN" in os.environ:
        end("RuntimeError: a token in the environment", bare=True)
    if MODE == "gated":
        end(
            "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x.",
            bare=True,
        )
    if MODE == "not found":
        end(
            "OSError: x/y is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
            bare=True,
        )
    if MODE == "unsupported":
        end("ValueError: Model architectures ['TernForCausalLM'] are not supported for now.")
    if MODE == "silent":
        time.sleep(3600)
    say(
        "core",
        f"Initializing a V1 LLM engine (v{MACHINE['version']}) with config: model='{given['model']}', dtype=torch.bfloat16, "
        f"max_seq_len={given['max-model-len']}, tensor_parallel_size=1, pipeline_parallel_size=1, quantization=None, "
        f"enforce_eager={'enforce-eager' in given}, kv_cache_dtype=auto, device_config=cpu",
    )
    if MODE == "out of memory":
        end("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB.")
    Answers.blocks, Answers.context, Answers.model = check(given), int(given["max-model-len"]), given["model"]
    cache = bytearray(Answers.blocks * MACHINE["block_bytes"])
    cache[::4096] = b"x" * len(cache[::4096])
    say("core", "init engine (profile, create kv cache, warmup model) took 0.10 s")
    server = ThreadingHTTPServer((given["host"], int(given["port"])), Answers)
    sys.stdout.write("INFO:     Application startup complete.\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
