"""Why a start of vLLM failed, by the root cause that it printed before its generic last line.

Texts: vllm/v1/core/kv_cache_utils.py, vllm/worker/worker.py (V0), vllm/v1/worker/gpu_worker.py and cpu_worker.py,
vllm/config, and the Hugging Face hub's; releases 0.6 to 0.33.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from harness.logs.numbers import SIZE, gib, number

FailureClass = Literal[
    "kv_too_small",
    "no_memory_for_cache",
    "free_below_utilization",
    "memory_moved",
    "out_of_memory",
    "gated",
    "not_found",
    "unsupported",
    "context_too_long",
    "other",
]

#: Longest text of a failure that is kept.
_LONGEST: Final = 600
_NUMBER: Final = SIZE
_TEXTS: Final[tuple[tuple[FailureClass, str], ...]] = (
    ("kv_too_small", r"To serve at least one request with the model"),
    ("kv_too_small", r"is larger than the maximum number of tokens that can be stored in (?:the )?KV cache"),
    ("no_memory_for_cache", r"No available memory for the cache blocks"),
    ("free_below_utilization", r"on startup is less than desired (?:GPU|CPU|XPU|\w+) memory utilization"),
    ("memory_moved", r"Error in memory profiling\."),
    ("out_of_memory", r"(?:CUDA|HIP|XPU|NPU|MPS) out of memory|OutOfMemoryError|CUDA error: out of memory"),
    ("gated", r"access a gated repo\b|Cannot access gated repo|GatedRepoError"),
    ("not_found", r"is not a local folder and is not a valid model identifier|Repository ?Not ?Found"),
    ("not_found", r"LocalEntryNotFoundError|Cannot find an appropriate cached snapshot folder"),
    ("not_found", r"Invalid repository ID or local directory|Repo id must be in the form"),
    ("unsupported", r"are not supported for now|Transformers does not recognize this architecture"),
    ("unsupported", r"has no vLLM implementation|Unknown quantization method|No common block size for"),
    ("unsupported", r"is not supported for the current GPU|is only supported on GPUs with compute capability"),
    ("context_too_long", r"User-specified max_model_len \(\d+\) is greater than the derived max_model_len"),
)
_SIGNS: Final = tuple((kind, re.compile(text)) for kind, text in _TEXTS)
#: What vLLM prints of a failure whose cause stands elsewhere.
_SECONDARY: Final = re.compile(
    r"Engine core initialization failed|Engine process failed to start|EngineCore failed to start|Failed core proc"
    r"|WorkerProc (?:initialization failed|failed to start)|EngineDeadError|See (?:stack trace|root cause)"
)
#: Cheap words of the lines above; a line without any of them says nothing of a failure.
HINTS: Final = (
    *(
        "Error",
        "Exception",
        "Value error, ",
        "To serve at least one",
        "stored in",
        "No available memory",
        "on startup is less",
        "out of memory",
    ),
    *("gated repo", "not a local folder", "snapshot folder", "not supported", "only supported", "does not recognize"),
    *("Failed core proc", "failed to start", "no vLLM implementation", "max_model_len ("),
)
#: Classes whose words no other program prints.
UNMISTAKABLE: Final = frozenset({"kv_too_small", "no_memory_for_cache", "free_below_utilization"})
_EXCEPTION: Final = re.compile(r"^(?:[A-Za-z_]\w{0,80}\.){0,8}[A-Za-z_]\w{0,80}(?:Error|Exception)\b(?::|$)")

_SEQUENCE: Final = re.compile(r"max seq len \((\d{1,12})\)")
_NEEDED: Final = re.compile(rf"\(?{_NUMBER} Gi?B KV cach")
_AVAILABLE: Final = re.compile(rf"KV cache memory \({_NUMBER} Gi?B\)")
_LONGEST_MODEL: Final = re.compile(
    r"[Ee]stimated maximum model length is (\d{1,12})|stored in (?:the )?KV cache \((\d{1,12})\)"
    r"|greater than the derived max_model_len \((?:\w{1,60}=)?(\d{1,12})"
)
_STARTUP: Final = re.compile(
    rf"\({_NUMBER}/{_NUMBER} GiB\) on startup is less than desired \w+ memory utilization \({_NUMBER}, {_NUMBER} GiB\)"
)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One root cause; bytes where a size is known."""

    kind: FailureClass
    text: str
    max_model_len: int | None = None
    needed_bytes: int | None = None
    available_bytes: int | None = None
    estimated_max_model_len: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    utilization: float | None = None
    requested_bytes: int | None = None


def is_secondary(line: str) -> bool:
    """Whether a line says that the start failed, and that its cause stands elsewhere."""
    return _SECONDARY.search(line) is not None


def is_exception(message: str) -> bool:
    """Whether a message is the last line of a traceback: ``ValueError: …``."""
    return _EXCEPTION.match(message) is not None


def classify(text: str) -> Failure | None:
    """The root cause that a message names; ``None`` if it names none that is known."""
    for kind, pattern in _SIGNS:
        found = pattern.search(text)
        if found is not None:
            before = text.rfind(": ", 0, found.start()) if kind != "out_of_memory" else -1
            return _read(kind, text, text[before + 2 :] if before >= 0 else text)
    return None


def unfinished(failure: Failure) -> bool:
    """Whether numbers of a KV cache that is too small may still come: terminals and collectors wrap long lines."""
    return failure.kind == "kv_too_small" and failure.estimated_max_model_len is None and len(failure.text) < _LONGEST


def _read(kind: FailureClass, text: str, message: str) -> Failure:
    startup = _STARTUP.search(text) if kind == "free_below_utilization" else None
    needed, available, longest = _NEEDED.search(text), _AVAILABLE.search(text), _LONGEST_MODEL.search(text)
    sequence = _SEQUENCE.search(text)
    return Failure(
        kind=kind,
        text=message[:_LONGEST],
        max_model_len=int(sequence[1]) if sequence else None,
        needed_bytes=_bytes(needed[1]) if needed else None,
        available_bytes=_bytes(available[1]) if available else None,
        estimated_max_model_len=int(longest[1] or longest[2] or longest[3]) if longest else None,
        free_bytes=_bytes(startup[1]) if startup else None,
        total_bytes=_bytes(startup[2]) if startup else None,
        utilization=number(startup[3]) if startup else None,
        requested_bytes=_bytes(startup[4]) if startup else None,
    )


def _bytes(text: str) -> int:
    return gib(text)
