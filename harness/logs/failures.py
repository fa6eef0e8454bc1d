"""Lines that say why a load failed. The first one of a load is nearest to the cause; those that follow repeat it upwards.

Sources: llama.cpp src/llama-model.cpp, src/llama-context.cpp, common/common.cpp, ggml's backends; ollama/ollama llm/server.go,
llm/llama_server.go, server/sched.go.
"""

from __future__ import annotations

import re
from typing import Final

_SIGNS: Final = (
    "out of memory", "emory allocation of size", "OutOfDeviceMemory", "OutOfHostMemory", "Malloc failed",
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
)
_SIGN: Final = re.compile("|".join(map(re.escape, _SIGNS)))
#: One of these stands in every sign: a line without them is not searched for all.
_ROOTS: Final = (
    "rror", "ailed", "emory", "nable to", "erminated", "timed out", "ASSERT", "SIG", "signal", "unknown model", "magic",
    "exception", "quantiz", "DeviceLost", "requires", "longer", "aborting", "exit", "Segm", "Illegal", "crashed", "buffer",
)  # fmt: skip


def cause(line: str) -> str | None:
    """The line, in one piece, if it says that a load failed."""
    for root in _ROOTS:
        if root in line:
            break
    else:
        return None
    if _SIGN.search(line) is None or any(other in line for other in _NOT):
        return None
    return " ".join(line.split())[:400]
