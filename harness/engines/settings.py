"""Variables of engines that are settings and nothing else: their names, and the values that they may have.

A file of another author may set this list; what is written in clear is this list too. A name is on it if no value of the
pattern can name a file, an address, a library, a program or a secret. Pure.

Names: llama.cpp b10434 (common/arg.cpp), Ollama 0.12 to 0.33 (envconfig/config.go), vLLM 0.6 to 0.33 (vllm/envs.py,
vllm/engine/arg_utils.py).
"""

from __future__ import annotations

import re
import shlex
from typing import Final, Literal

from harness.errors import UsageError

_NUMBER: Final = r"-?\d{1,12}(?:\.\d{1,9})?"
_SWITCH: Final = r"(?i:0|1|on|off|true|false|yes|no|auto|enabled?|disabled?)"
_WORD: Final = r"[A-Za-z][A-Za-z0-9_.-]{0,31}"
_NUMBERS: Final = rf"{_NUMBER}(?:[,/]{_NUMBER}){{0,63}}"
#: Indices and UUIDs of GPUs; empty hides them all.
_DEVICES: Final = r"(?:(?:(?:GPU|MIG)-[0-9a-fA-F-]{1,40}|\d{1,3})(?:,|$)){0,16}|-1"
#: ``KEY=int:8192`` of a GGUF's metadata; whole numbers, fractions and switches, no text.
_OVERRIDES: Final = (
    r"[a-z0-9_.]{1,80}=(?:int|float|bool):[0-9a-z.+-]{1,20}(?:,[a-z0-9_.]{1,80}=(?:int|float|bool):[0-9a-z.+-]{1,20}){0,31}"
)
#: ``blk\.\d+\.ffn_.*=CPU``: patterns of tensor names and the buffers that hold them.
_TENSORS: Final = (
    r"[\w.|()*+?\\\[\]^$-]{1,200}=[A-Za-z_]{1,20}\d{0,3}(?:,[\w.|()*+?\\\[\]^$-]{1,200}=[A-Za-z_]{1,20}\d{0,3}){0,31}"
)
#: Options of the user's own for ``vllm serve``, given as ``--env VLLM_ARGS='--dtype half'``: each is looked at by itself.
ARGUMENTS: Final = "VLLM_ARGS"
REDACTED: Final = "(redacted)"

_LLAMA_NUMBERS: Final = (
    "BATCH", "CACHE_RAM", "CACHE_REUSE", "CHECKPOINT_MIN_SPACING_NT", "CTX_CHECKPOINTS", "CTX_SIZE", "DEFRAG_THOLD",
    "DRAFT_MAX", "DRAFT_MIN", "FIT_CTX", "GRP_ATTN_N", "GRP_ATTN_W", "IMAGE_MAX_TOKENS", "IMAGE_MIN_TOKENS", "LOG_VERBOSITY",
    "MAIN_GPU", "MTMD_BATCH_MAX_TOKENS", "N_CPU_MOE", "N_GPU_LAYERS_DRAFT", "N_PARALLEL", "N_PREDICT", "ROPE_FREQ_BASE",
    "ROPE_FREQ_SCALE", "ROPE_SCALE", "SPEC_DRAFT_N_CPU_MOE", "SPEC_DRAFT_N_MAX", "SPEC_DRAFT_N_MIN", "SPEC_DRAFT_P_MIN",
    "SPEC_DRAFT_P_SPLIT", "THREADS", "THREADS_HTTP", "TIMEOUT", "TOP_K", "UBATCH", "YARN_ATTN_FACTOR", "YARN_BETA_FAST",
    "YARN_BETA_SLOW", "YARN_EXT_FACTOR", "YARN_ORIG_CTX",
)  # fmt: skip
_LLAMA_SWITCHES: Final = (
    "CACHE_IDLE_SLOTS", "CACHE_PROMPT", "CONTEXT_SHIFT", "CONT_BATCHING", "CPU_MOE", "DIO", "EMBEDDINGS", "FIT", "FIT_ESTIMATE",
    "FLASH_ATTN", "JINJA", "KV_OFFLOAD", "KV_UNIFIED", "MLOCK", "MMAP", "MMPROJ_OFFLOAD", "NO_HOST", "NO_KV_OFFLOAD", "NO_MMAP",
    "NO_REPACK", "OFFLINE", "PERF", "REPACK", "RERANKING", "SPEC_DRAFT_CPU_MOE", "SWA_FULL",
)  # fmt: skip
_LLAMA_WORDS: Final = (
    "CACHE_TYPE_K", "CACHE_TYPE_V", "LOAD_MODE", "NUMA", "POOLING", "ROPE_SCALING_TYPE", "SPEC_DRAFT_CACHE_TYPE_K",
    "SPEC_DRAFT_CACHE_TYPE_V", "SPEC_TYPE", "SPLIT_MODE",
)  # fmt: skip

_VALUES: Final[dict[str, str]] = {
    **{f"LLAMA_ARG_{name}": _NUMBER for name in _LLAMA_NUMBERS},
    **{f"LLAMA_ARG_{name}": _SWITCH for name in _LLAMA_SWITCHES},
    **{f"LLAMA_ARG_{name}": _WORD for name in _LLAMA_WORDS},
    "LLAMA_ARG_N_GPU_LAYERS": rf"{_NUMBER}|all|auto",
    "LLAMA_ARG_DEVICE": r"[A-Za-z]{1,16}\d{0,3}(?:,[A-Za-z]{1,16}\d{0,3}){0,15}",
    "LLAMA_ARG_FIT_TARGET": _NUMBERS,
    "LLAMA_ARG_TENSOR_SPLIT": _NUMBERS,
    "LLAMA_ARG_OVERRIDE_KV": _OVERRIDES,
    "LLAMA_ARG_OVERRIDE_TENSOR": _TENSORS,
    **dict.fromkeys(
        (
            *("OLLAMA_CONTEXT_LENGTH", "OLLAMA_GPU_OVERHEAD", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MAX_QUEUE"),
            *("OLLAMA_NUM_PARALLEL", "OLLAMA_DEBUG"),
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            *("OLLAMA_FLASH_ATTENTION", "OLLAMA_MULTIUSER_CACHE", "OLLAMA_NEW_ENGINE", "OLLAMA_NEW_ESTIMATES"),
            *("OLLAMA_NOHISTORY", "OLLAMA_SCHED_SPREAD", "OLLAMA_VULKAN", "OLLAMA_GO_TEMPLATE"),
            *("OLLAMA_IGPU_ENABLE",),
        ),
        _SWITCH,
    ),
    "OLLAMA_KV_CACHE_TYPE": _WORD,
    "OLLAMA_KEEP_ALIVE": r"-?\d{1,9}(?:ns|us|ms|s|m|h)?",
    "OLLAMA_LOAD_TIMEOUT": r"-?\d{1,9}(?:ns|us|ms|s|m|h)?",
    **dict.fromkeys(
        (
            *("GGML_CUDA_DISABLE_GRAPHS", "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "GGML_CUDA_FORCE_CUBLAS"),
            *("GGML_CUDA_FORCE_MMQ", "GGML_CUDA_NO_PINNED", "GGML_SCHED_MAX_COPIES", "GGML_VK_DISABLE_COOPMAT"),
            *("GGML_VK_DISABLE_COOPMAT2", "GGML_VK_DISABLE_F16", "GGML_VK_PREFER_HOST_MEMORY", "GGML_OP_OFFLOAD_MIN_BATCH"),
            *("GOGC", "MALLOC_PERTURB_", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "GOMAXPROCS"),
            *("VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_CPU_KVCACHE_SPACE", "VLLM_USE_V1"),
            *("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", "VLLM_USE_FLASHINFER_SAMPLER"),
        ),
        _NUMBER,
    ),
    # What keeps to itself may be asked for, not undone.
    **dict.fromkeys(
        ("DO_NOT_TRACK", "HF_HUB_OFFLINE", "NO_COLOR", "OLLAMA_NOPRUNE", "OLLAMA_NO_CLOUD", "VLLM_NO_USAGE_STATS"), "1|true"
    ),
    "VLLM_ATTENTION_BACKEND": _WORD,
    "VLLM_LOGGING_LEVEL": _WORD,
    "CUDA_DEVICE_ORDER": _WORD,
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), _DEVICES
    ),
}
_PATTERNS: Final = {name: re.compile(pattern, re.ASCII) for name, pattern in _VALUES.items()}

#: Options of ``vllm serve`` without a value, and those with one.
_SWITCHES: Final = frozenset(
    {
        *("--enforce-eager", "--enable-prefix-caching", "--no-enable-prefix-caching", "--enable-chunked-prefill"),
        *("--no-enable-chunked-prefill", "--disable-custom-all-reduce", "--enable-expert-parallel", "--disable-log-stats"),
        *("--disable-sliding-window", "--async-scheduling", "--no-async-scheduling", "--language-model-only"),
    }
)
_OPTIONS: Final = {
    **dict.fromkeys(
        (
            *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"),
            *("--max-num-batched-tokens", "--block-size", "--swap-space", "--cpu-offload-gb", "--seed", "--max-logprobs"),
            *("--num-gpu-blocks-override", "--max-seq-len-to-capture", "--optimization-level", "-O"),
            *("--max-num-partial-prefills", "--long-prefill-token-threshold", "--max-cudagraph-capture-size"),
        ),
        re.compile(_NUMBER, re.ASCII),
    ),
    **dict.fromkeys(
        (
            *("--dtype", "--quantization", "-q", "--kv-cache-dtype", "--load-format", "--attention-backend"),
            *("--scheduling-policy", "--mm-processor-cache-type"),
        ),
        re.compile(_WORD, re.ASCII),
    ),
    "--distributed-executor-backend": re.compile("mp|ray|uni"),  # anything else is imported as a class
}


def is_setting(name: str, value: str) -> bool:
    """Whether a variable of an engine, with this value, is a setting and can be nothing else."""
    if name == ARGUMENTS:
        return not unknown_options(value) and shown_arguments(value) == value
    pattern = _PATTERNS.get(name)
    return pattern is not None and pattern.fullmatch(value) is not None


def settings_alone(env: dict[str, str]) -> dict[str, str]:
    """The variables of an environment that are settings."""
    return {name: value for name, value in env.items() if is_setting(name, value)}


def shown(name: str, value: str) -> str:
    """A value as it may be written: in clear where it is a setting, else ``(redacted)``."""
    if name == ARGUMENTS:
        return shown_arguments(value)
    return value if is_setting(name, value) else REDACTED


def shown_env(env: dict[str, str]) -> dict[str, str]:
    """An environment as it may be written."""
    return {name: shown(name, value) for name, value in env.items()}


def hidden(env: dict[str, str]) -> tuple[str, ...]:
    """The values that are not written in clear: they must not stand in a log either. Paths are none."""
    values = [value for name, value in env.items() if name != ARGUMENTS and shown(name, value) != value]
    for word, written in zip(_words(env.get(ARGUMENTS, "")), _words(shown_arguments(env.get(ARGUMENTS, ""))), strict=False):
        if word != written:
            values.append(word.partition("=")[2] if word.startswith("-") else word)
    return tuple(value for value in values if value and not value.startswith(("/", "./", "../", "~")))


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return []


def shown_arguments(text: str) -> str:
    """Options of ``vllm serve`` as they may be written: what is not known to be a setting is ``(redacted)``."""
    try:
        words = shlex.split(text)
    except ValueError:
        return REDACTED
    written = shown_words(tuple(words))
    return text if written == tuple(words) else shlex.join(written)


def shown_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """The same, of options that have been split; each stays beside its name."""
    found: list[str] = []
    option: str | None = None  # whose value is next
    for word in words:
        name, sign, value = word.partition("=")
        plain = name if name.startswith("-") else ""
        if sign and plain:
            pattern = _OPTIONS.get(plain)
            found.append(word if pattern is not None and pattern.fullmatch(value) else f"{_name(plain)}={REDACTED}")
            option = None
        elif plain:
            found.append(_name(plain))
            option = plain
        else:
            pattern = _OPTIONS.get(option or "")
            found.append(word if pattern is not None and pattern.fullmatch(word) else REDACTED)
            option = None
    return tuple(found)


def _name(option: str) -> str:
    """An option's name: one that is no name may be a value."""
    return option if re.fullmatch(r"--?[A-Za-z][A-Za-z0-9_.-]{0,63}", option, re.ASCII) else REDACTED


def unknown_options(text: str) -> tuple[str, ...]:
    """Options of ``vllm serve`` that are not known to be settings: loaders, plugins, files, addresses, and new ones."""
    try:
        words = shlex.split(text)
    except ValueError:
        return (text,)
    names = [word.partition("=")[0] for word in words if word.startswith("-")]
    return tuple(name for name in names if name not in _SWITCHES and name not in _OPTIONS)


#: Flash attention as it is asked for, and as records have it.
_FLASH: Final[dict[Literal["on", "off"], Literal["enabled", "disabled"]]] = {"on": "enabled", "off": "disabled"}


def recorded_flash(said: str | None) -> Literal["enabled", "disabled"] | None:
    """Flash attention as records have it, of a choice or of what one has; ``None``: it is left to the engine."""
    return next((word for asked, word in _FLASH.items() if said in (asked, word)), None)


def asked_flash(said: str | None) -> Literal["auto", "on", "off"]:
    """The choice that leads to what a record has; a choice stays what it is.

    Raises:
        UsageError: it is neither.
    """
    if said in (None, "auto"):
        return "auto"
    for asked, word in _FLASH.items():
        if said in (asked, word):
            return asked
    raise UsageError(f"flash attention is enabled or disabled, not {said!r}")
