"""Lines that say why a load failed. The first one of a load is nearest to the cause; those that follow repeat it upwards.

Sources: llama.cpp src/llama-model.cpp, src/llama-context.cpp, common/common.cpp, ggml's backends; ollama/ollama llm/server.go,
llm/llama_server.go, server/sched.go.
"""

from __future__ import annotations

import re
from typing import Final

from harness.logs.slog import pairs

SIGNS: Final = (
    "out of memory", "allocation of size", "OutOfDeviceMemory", "OutOfHostMemory", "Malloc failed",
    "failed to allocate", "unable to allocate", "error loading model", "failed to load model",
    "failed to open GGUF", "unable to load model", "unable to create llama context",
    "failed to initialize the context", "failed to create context", "failed to create llama_context", "failed to create server",
    "llama_init_from_model: failed", "unknown model architecture", "invalid magic", "exception during initialization",
    "V cache quantization requires", "quantized V cache", "requires more system memory", "memory layout cannot be allocated",
    "process has terminated", "process no longer running", "runner terminated", "llama-server terminated", "aborting load",
    "runner exited with error", "error starting", "Load failed", "error loading llama server", "startup failed",
    "timed out waiting for llama", "GGML_ASSERT", "CUDA error", "ROCm error", "HIP error", "DeviceLost", "Illegal instruction",
    "Segmentation fault", "SIGSEGV", "SIGABRT", "SIGILL", "signal: killed", "RPC server crashed", "exiting due to model",
)  # fmt: skip
#: Not the end of a load: the engine goes another way, or the line speaks of something else.
_NOT: Final = (
    "retrying",
    "evicting a model",
    "pinned memory",
    "cuda_init",
    "discover",
    "failed to fit",
    "GPU discovery",
    "refresh free memory",
    "failed to measure",
    "fmt.Errorf(",
    "errors.New(",
)
_SIGN: Final = re.compile("|".join(map(re.escape, SIGNS)))
#: Where the engine's own words begin: a function, or a file and a line.
_OWN: Final = re.compile(
    r"(?<![\w/.])(?:[\w/.-]{1,200}\.(?:c|cc|cpp|cu|cuh|h|hpp|m|mm):\d{1,6}: "
    r"|(?:ggml|gguf|ll|common|clip|alloc|load|srv|main)\w{0,60}: )"
)
_TRACE: Final = re.compile(r"^\s*(?:/\S+|\w+)\.go:\d{1,6}(?: \+0x[\da-f]+)?$|^goroutine \d")


def cause(line: str) -> str | None:
    """Why a load failed, in the engine's words and in one piece, if the line says so."""
    if _SIGN.search(line) is None or any(other in line for other in _NOT) or _TRACE.search(line):
        return None
    if "level=" in line and "msg=" in line:
        fields = pairs(line)
        text = ": ".join(fields[key] for key in ("msg", "error", "err") if fields.get(key))
        if (
            fields.get("level") in ("INFO", "DEBUG", "TRACE")
            and "error" not in fields
            and "err" not in fields
            and "failed" not in text.lower()
            and "aborting" not in text
        ):
            return None
        line = text or line
    elif own := _OWN.search(line):
        line = line[own.start() :]
    return " ".join(line.split())[:400]
