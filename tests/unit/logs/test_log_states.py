"""What a line means depends on what came before it: passes, failures that are overcome, lines after the load."""

from __future__ import annotations

import pytest

from harness.logs import parse_log
from harness.model.facts import LoadFacts
from harness.units import MIB

META = "llama_model_loader: loaded meta data with 33 pairs and 236 tensors from /models/a.gguf (version GGUF V3 (latest))\n"
WEIGHTS = "load_tensors:   CPU_Mapped model buffer size =    70.00 MiB\n"
GPU_WEIGHTS = "load_tensors:        CUDA0 model buffer size =   400.00 MiB\n"
CONTEXT = """\
llama_context: constructing llama_context
llama_context: n_ctx                 = 8192
llama_kv_cache:      CUDA0 KV buffer size =    96.00 MiB
llama_kv_cache: size =   96.00 MiB (  8192 cells,  18 layers,  1/1 seqs), K (f16):   48.00 MiB, V (f16):   48.00 MiB
sched_reserve:      CUDA0 compute buffer size =    50.00 MiB
"""
READY = "srv  llama_server: model loaded\n"


def only(text: str) -> LoadFacts:
    (facts,) = parse_log(text)
    return facts


def test_a_failure_that_was_overcome_is_none() -> None:
    """A buffer that could not be allocated is tried again smaller, and the server answers after all."""
    failed = "ggml_vulkan: Device memory allocation of size 1073741824 failed.\n"
    overcome = only(META + WEIGHTS + GPU_WEIGHTS + failed + CONTEXT + READY)
    assert (overcome.complete, overcome.failed, overcome.failure) == (True, False, None)
    ended = only(META + WEIGHTS + GPU_WEIGHTS + failed + CONTEXT)
    assert (ended.complete, ended.failed) == (False, True)
    assert "1073741824" in str(ended.failure)


def test_weights_that_are_read_again_replace_those_before() -> None:
    """A first pass that made no context is a try: what counts is what was allocated last."""
    again = only(META + WEIGHTS + META + WEIGHTS + GPU_WEIGHTS + CONTEXT + READY)
    assert {name: device.weights_bytes for name, device in again.devices.items()} == {
        "CPU_Mapped": 70 * MIB,
        "CUDA0": 400 * MIB,
    }


@pytest.mark.parametrize(
    ("line", "complete"),
    [
        ("main: HTTP server is listening, hostname: 127.0.0.1, port: 8080, http threads: 7\n", False),
        ("main: server is listening on http://127.0.0.1:8080 - starting the main loop\n", True),
    ],
)
def test_a_server_that_only_listens_has_no_model_yet(line: str, complete: bool) -> None:
    assert only(META + WEIGHTS + GPU_WEIGHTS + CONTEXT + line).complete == complete


def test_a_size_of_nothing_is_no_figure() -> None:
    """Ollama's Go engine prints "0 B" for a part before it has reserved anything for it."""
    go = "time=2026-03-01T09:00:00Z level=INFO source=device.go:240 msg="
    weights, cache = '"model weights" device=CUDA0 size="3.0 GiB"', '"kv cache" device=CUDA0 size="0 B"'
    text = f'{go}"starting ollama engine"\n{go}{weights}\n{go}{cache}\n'
    facts = only(text)
    assert facts.devices["CUDA0"].weights_bytes == 3 * 1024 * MIB
    assert facts.devices["CUDA0"].kv_cache_bytes is None


def test_until_august_2023_the_total_counts_the_scratch_buffer() -> None:
    facts = only(
        "llama_model_load_internal: allocating batch_size x (512 kB + n_ctx x 128 B) = 384 MB VRAM for the scratch buffer\n"
        "llama_model_load_internal: total VRAM used: 4240 MB\n"
    )
    device = facts.devices["CUDA0"]
    assert (device.weights_bytes, device.compute_bytes) == ((4240 - 384) * MIB, 384 * MIB)


BREAKDOWN = """\
common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
common_memory_breakdown_print: |   - CUDA0 (Test A) | 24576 = {free} + ( {own} =   400 +      96 +      {compute}) +      -113 |
"""


def test_the_table_that_is_printed_at_exit_is_no_projection() -> None:
    before, after = BREAKDOWN.format(free=24000, own=546, compute=50), BREAKDOWN.format(free=20000, own=596, compute=100)
    load = META + WEIGHTS + GPU_WEIGHTS + CONTEXT + READY
    projected = "common_params_fit_impl: projected to use 546 MiB of device memory vs. 24000 MiB of free device memory\n"
    assert only(load + after + projected).fit is None
    facts = only(before + load + after)
    assert facts.fit is not None
    assert [(row.free_bytes, row.compute_bytes) for row in facts.fit.rows] == [(24000 * MIB, 50 * MIB)]


VLLM = """\
(EngineCore pid=7) INFO 10-06 17:00:05 [core.py:121] Initializing a V1 LLM engine (v0.31.0) with config: model='acme/Tern-8B'
(EngineCore pid=7) INFO 10-06 17:00:11 [model_runner.py:407] Model loading took 15.0 GiB memory and 5.420225 seconds
(EngineCore pid=7) INFO 10-06 17:00:33 [gpu_worker.py:692] Available KV cache memory: 2.5 GiB
"""
SIZE = "(EngineCore pid=7) INFO 10-06 17:00:33 [kv_cache_utils.py:2464] GPU KV cache size: {tokens} tokens\n"
INITIALISED = (
    "(EngineCore pid=7) INFO 10-06 17:00:40 [core.py:200] init engine (profile, create kv cache, warmup) took 7.1 seconds\n"
)


def test_the_smallest_cache_of_several_workers_holds_for_the_engine() -> None:
    """Up to 0.11 each worker prints its own."""
    for sizes in (("20,480", "24,576"), ("24,576", "20,480")):
        facts = only(VLLM + "".join(SIZE.format(tokens=one) for one in sizes) + INITIALISED)
        assert facts.vllm is not None
        assert facts.vllm.kv_tokens == 20_480


def test_an_engine_in_a_script_that_dies_after_its_start_had_started() -> None:
    """``vllm.LLM`` announces no server: what fails once the engine is ready is a request."""
    died = "(EngineCore pid=7) ERROR 10-06 17:09:00 [core.py:900] EngineDeadError: EngineCore encountered an issue.\n"
    facts = only(VLLM + SIZE.format(tokens="20,480") + INITIALISED + died)
    assert (facts.complete, facts.failed) == (True, False)
    assert only(VLLM + died).failed
