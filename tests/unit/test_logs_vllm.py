"""vLLM's log beyond the golden ones: failed starts by cause, several starts, wrapped lines, engines in parallel, any bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.logs import parse_chunks, parse_log
from harness.model.facts import LoadFacts, VllmFacts
from harness.units import GIB

BANNER = "(APIServer pid=1) INFO 10-06 17:00:00 [api_utils.py:347]   █▄█▀ █     █  version 0.31.0\n"
CONFIG = (
    "(EngineCore pid=7) INFO 10-06 17:00:05 [core.py:121] Initializing a V1 LLM engine (v0.31.0) with config: "
    "model='acme/Tern-8B', dtype=torch.bfloat16, max_seq_len=8192, tensor_parallel_size=1, kv_cache_dtype=auto\n"
)
LOADED = (
    "(EngineCore pid=7) INFO 10-06 17:00:11 [model_runner.py:407] Model loading took 15.0 GiB memory and 5.420225 seconds\n"
)
SIZED = (
    "(EngineCore pid=7) INFO 10-06 17:00:33 [gpu_worker.py:692] Available KV cache memory: 2.5 GiB\n"
    "(EngineCore pid=7) INFO 10-06 17:00:33 [kv_cache_utils.py:2464] GPU KV cache size: 20,480 tokens, "
    "Maximum concurrency for 8,192 tokens per request: 2.50x\n"
)
READY = "(APIServer pid=1) INFO:     Application startup complete.\n"
GENERIC = "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"


def only(text: str) -> tuple[LoadFacts, VllmFacts]:
    (facts,) = parse_log(text)
    assert facts.vllm is not None
    return facts, facts.vllm


def raised(text: str) -> str:
    return f"(EngineCore pid=7) ERROR 10-06 17:00:40 [core.py:1349] {text}\n"


CAUSES = {
    "no_memory_for_cache": raised("ValueError: No available memory for the cache blocks. Try increasing it."),
    "free_below_utilization": (
        "(EngineCore pid=7) ValueError: Available memory on node 0 (16.35/20.34 GiB) on startup is less than desired CPU "
        "memory utilization (0.99, 20.13 GiB). Decrease it.\n"
    ),
    "memory_moved": raised(
        "AssertionError: Error in memory profiling. Initial free memory 9.1 GiB, current free memory 9.9 GiB."
    ),
    "out_of_memory": raised("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total"),
    "not_found": (
        "OSError: acme/Tren is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'\n"
    ),
    "gated": "OSError: You are trying to access a gated repo.\nMake sure to have access to it.\n",
    "unsupported": (
        "  Value error, The checkpoint you are trying to load has model type `tern` but Transformers does not recognize this "
        "architecture.\n"
    ),
    "context_too_long": (
        "  Value error, User-specified max_model_len (99999) is greater than the derived max_model_len "
        "(max_position_embeddings=32768)\n"
    ),
    "other": raised("KeyError: 'layers.0.mlp.experts'"),
}


@pytest.mark.parametrize(("kind", "cause"), CAUSES.items(), ids=CAUSES)
def test_a_failed_start_is_classified_by_its_root_cause(kind: str, cause: str) -> None:
    noise = "(EngineCore pid=7) WARNING 10-06 17:00:06 [import_utils.py:408] AssertionError: a module was not found\n"
    facts, vllm = only(BANNER + CONFIG + noise + cause + GENERIC)
    assert (facts.failed, facts.complete, vllm.failure_class) == (True, False, kind)
    assert facts.failure is not None
    assert "Engine core initialization failed" not in facts.failure


def test_the_words_of_a_cause_are_kept_whole() -> None:
    failure = only(BANNER + CAUSES["context_too_long"])[0].failure
    assert failure is not None
    assert failure.startswith("context longer than the model allows: Value error, User-specified max_model_len (99999)")


def test_a_cache_that_is_too_small_gives_its_numbers() -> None:
    text = (
        "ValueError: To serve at least one request with the model's max seq len (8192), (1.25 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (1.0 GiB). Based on the available memory, the estimated maximum model "
        "length is 6528. Try increasing `gpu_memory_utilization`."
    )
    _, vllm = only(CONFIG + raised(text) + raised(text) + GENERIC)
    assert (vllm.needed_bytes, vllm.available_bytes) == (1.25 * GIB, GIB)
    assert (vllm.max_model_len, vllm.estimated_max_model_len) == (8192, 6528)


def test_a_message_that_a_terminal_wrapped_is_put_together() -> None:
    start = (
        "(EngineCore pid=7) ValueError: To serve at least one request with the model's max seq len (8192), (1.25 GiB KV cach"
    )
    rest = "e is needed, which is larger than the available KV cache memory (1.0 GiB). Based on the avai"
    _, vllm = only(f"{start}\n{rest}\n{GENERIC}")
    assert (vllm.needed_bytes, vllm.available_bytes) == (1.25 * GIB, GIB)


def test_hints_about_memory_and_failing_requests_are_no_failed_start() -> None:
    hint = "INFO 08-19 20:45:19 [model_runner.py:1450] If out-of-memory error occurs during cudagraph capture, consider …\n"
    later = raised("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB.")
    facts, _ = only(BANNER + CONFIG + LOADED + hint + SIZED + READY + later)
    assert (facts.complete, facts.failed, facts.failure) == (True, False, None)


def test_the_line_that_says_something_is_kept_of_a_cause_without_a_class() -> None:
    first = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
    then = "  Value error, limit_mm_per_prompt is of no use here [type=value_error]\n"
    assert only(BANNER + first + then)[0].failure == "limit_mm_per_prompt is of no use here [type=value_error]"
    assert only(CONFIG + "[rank0]: KeyError: 'mlp'\n" + GENERIC)[0].failure == "KeyError: 'mlp'"


def test_a_guessed_cause_is_dropped_when_the_start_goes_on() -> None:
    facts, _ = only(BANNER + CONFIG + raised("OSError: could not stat a file") + LOADED + SIZED + READY)
    assert (facts.complete, facts.failed) == (True, False)


def test_a_script_without_a_server_is_up_once_its_engine_is() -> None:
    ready = (
        "(EngineCore pid=7) INFO 10-06 17:00:50 [core.py:361] init engine (profile, create kv cache, warmup model) took 9.1 s\n"
    )
    later = raised("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB.")
    assert only(CONFIG + LOADED + SIZED + ready + later)[0].complete
    facts, vllm = only(BANNER + CONFIG + LOADED + SIZED + ready + later + GENERIC)  # a server that never came up
    assert (facts.failed, vllm.failure_class) == (True, "out_of_memory")


def test_a_progress_bar_in_front_of_a_line_hides_nothing() -> None:
    bar = "Capturing CUDA graphs (decode, FULL):  98%|█████████▊  | 50/51 [00:29<00:00,  1.61it/s]"
    ready = (
        "(EngineCore pid=7) INFO 10-06 17:00:50 [core.py:361] init engine (profile, create kv cache, warmup model) took 9.1 s\n"
    )
    facts, vllm = only(CONFIG + bar + LOADED + bar + SIZED + bar + ready)
    assert (facts.complete, facts.model, vllm.kv_tokens) == (True, "acme/Tern-8B", 20480)


def test_each_start_of_a_log_is_a_load() -> None:
    start = BANNER + CONFIG + LOADED + SIZED + READY
    bare = LOADED + SIZED  # a log cut down to the lines of memory: the second weights begin another start
    assert len(parse_log(start + start)) == 2
    assert len(parse_log(bare + bare)) == 2


def test_engines_of_data_parallelism_are_one_start() -> None:
    def engine(number: int, text: str) -> str:
        return text.replace("EngineCore pid=7", f"EngineCore_DP{number} pid={number + 7}")

    log = BANNER + engine(0, CONFIG + LOADED + SIZED) + engine(1, CONFIG + LOADED + SIZED) + READY
    _, vllm = only(log)
    assert [worker.name for worker in vllm.workers] == ["EngineCore_DP0", "EngineCore_DP1"]


def test_engines_on_ray_are_one_start_by_their_number() -> None:
    def actor(pid: int, text: str) -> str:
        both = text.replace("EngineCore pid=7", f"DPEngineCoreActor pid={pid}, ip=192.0.2.{pid}")
        return both.replace("tensor_parallel_size=1", "tensor_parallel_size=1, data_parallel_size=2")

    init = (
        "(EngineCore pid=7) INFO 10-06 17:00:50 [core.py:361] init engine (profile, create kv cache, warmup model) took 9.1 s\n"
    )
    log = actor(5, CONFIG + LOADED) + actor(6, CONFIG) + actor(5, SIZED + init) + actor(6, LOADED + SIZED + init)
    facts, vllm = only(BANNER + log + READY)
    assert facts.complete
    assert [worker.weights_bytes for worker in vllm.workers] == [15 * GIB, 15 * GIB]
    assert len(parse_log(BANNER + log + READY + BANNER + log + READY)) == 2


def test_blocks_of_v0_take_their_size_from_the_concurrency() -> None:
    log = (
        "INFO 08-02 17:37:54 llm_engine.py:249] Initializing an LLM engine (v0.6.5) with config: model='a'\n"
        "INFO 08-02 17:37:54 hpu_executor.py:85] # HPU blocks: 1519, # CPU blocks: 0\n"
    )
    assert only(log)[1].kv_tokens is None
    known = "INFO 08-02 17:37:54 hpu_executor.py:89] Maximum concurrency for 8192 tokens per request: 23.73x\n"
    assert only(log + known)[1].kv_tokens == 1519 * 128


def test_a_worker_is_told_by_its_name_where_somebody_took_its_pid_away() -> None:
    lines = "".join(
        f"(Worker_PP{rank}_TP0) INFO [gpu_worker.py:647] Available KV cache memory: {6 - rank}.5 GiB\n" for rank in (0, 1)
    )
    assert [(worker.name, worker.kv_available_bytes) for worker in only(lines)[1].workers] == [
        ("Worker_PP0_TP0", 6.5 * GIB),
        ("Worker_PP1_TP0", 5.5 * GIB),
    ]


def test_a_line_of_json_speaks_for_its_process() -> None:
    def line(name: str, message: str) -> str:
        return json.dumps({"levelname": "INFO", "message": message, "vllm_process_name": name, "process": 12}) + "\n"

    _, vllm = only(line("Worker_TP1", "Model loading took 7.5 GiB memory and 2.0 seconds"))
    assert [(worker.name, worker.weights_bytes) for worker in vllm.workers] == [("Worker_TP1", 7.5 * GIB)]


def test_other_logs_hold_no_start_of_vllm() -> None:
    other = (
        'level=INFO msg="inference compute" total="24.0 GiB"\nOutOfMemoryError: CUDA out of memory\nversion 3 of something\n'
    )
    assert parse_log(other) == []


PIECES = (
    BANNER,
    CONFIG,
    LOADED,
    SIZED,
    READY,
    GENERIC,
    raised("ValueError: x"),
    "\x1b[1;36m",
    "\r",
    '{"message": "',
    "█ version ",
)
chunks = st.lists(st.one_of(st.sampled_from([piece.encode() for piece in PIECES]), st.binary(max_size=40)), max_size=20)


@settings(max_examples=80, deadline=None)
@given(chunks)
def test_any_pieces_are_read_the_same_however_they_arrive(parts: list[bytes]) -> None:
    whole = parse_log(b"".join(parts))
    assert parse_chunks(parts) == whole
    for facts in whole:
        json.dumps(facts.to_json(), allow_nan=False)


def test_flash_attention_is_what_was_chosen_not_what_was_offered() -> None:
    offered = (
        "INFO 01-01 00:00:00 [cuda.py:400] Using TRITON_ATTN attention backend out of potential backends: ['FLASH_ATTN']\n"
    )
    chosen = "INFO 01-01 00:00:00 [cuda.py:400] Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN']\n"
    assert only(CONFIG + offered)[0].flash_attention is None
    assert only(CONFIG + chosen)[0].flash_attention == "enabled"


def test_a_number_with_too_many_points_raises_nothing() -> None:
    assert parse_log("GPU KV cache size: 4,352 tokens, Maximum concurrency for 4,096 tokens per request: 1.....06x\n")


def test_a_cache_type_that_the_model_chose_is_the_one_that_the_backend_resolved() -> None:
    """``auto`` is the type of the activations unless the checkpoint says otherwise (v1/attention/backends/flashinfer.py)."""
    resolved = (
        "(EngineCore pid=7) INFO 08-04 07:41:42 [flashinfer.py:780] FlashInfer resolved query dtypes: prefill=torch.bfloat16, "
        "decode=torch.bfloat16, decode_backend=flashinfer-native, kv_cache_dtype=torch.float8_e4m3fn, arch=sm121\n"
    )
    engine = (
        "(EngineCore pid=7) INFO 10-06 17:00:00 [core.py:93] Initializing a V1 LLM engine (v0.25.1) with config: model='a/b', "
        "dtype=torch.bfloat16, max_seq_len=8192, kv_cache_dtype={}, enforce_eager=False\n"
    )
    auto, asked = engine.format("auto"), engine.format("fp8_e5m2")
    kinds = [only(text + SIZED + READY)[0].kv_cache_type for text in (auto, auto + resolved, asked + resolved)]
    assert kinds == ["bfloat16", "fp8", "fp8_e5m2"]
