"""Traps of real logs, each of which has misled a parser; formats as documented, figures of our own."""

from __future__ import annotations

import json

import pytest

from harness.logs import parse_log
from harness.model.facts import LoadFacts
from harness.units import MIB

MAIN = """\
llama_model_loader: loaded meta data with 33 key-value pairs and 236 tensors from /models/a.gguf (version GGUF V3 (latest))
load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
load_tensors: offloaded 19/19 layers to GPU
load_tensors:   CPU_Mapped model buffer size =    70.00 MiB
load_tensors:        CUDA0 model buffer size =   400.00 MiB
llama_context: constructing llama_context
llama_context: n_seq_max             = 1
llama_context: n_ctx                 = 8192
llama_context: n_ubatch              = 512
llama_context: flash_attn            = auto
llama_kv_cache:      CUDA0 KV buffer size =    96.00 MiB
llama_kv_cache: size =   96.00 MiB (  8192 cells,  18 layers,  1/1 seqs), K (f16):   48.00 MiB, V (f16):   48.00 MiB
sched_reserve: Flash Attention was auto, set to enabled
sched_reserve:      CUDA0 compute buffer size =    50.00 MiB
"""
READY = "srv  llama_server: model loaded\n"


def loads(text: str) -> list[LoadFacts]:
    return parse_log(text)


def only(text: str) -> LoadFacts:
    (facts,) = parse_log(text)
    return facts


def mib(facts: LoadFacts, part: str, device: str | None = None) -> float | None:
    size = getattr(facts.devices[device], f"{part}_bytes") if device else facts.total(f"{part}_bytes")
    return None if size is None else round(size / MIB, 2)


def test_a_model_in_several_files_adds_its_lines() -> None:
    again = "load_tensors:   CPU_Mapped model buffer size =    70.00 MiB\n"
    assert mib(only(MAIN.replace(again, again * 3)), "weights", "CPU_Mapped") == 210.0


def test_a_probe_at_high_verbosity_is_dropped_whole() -> None:
    probe = MAIN.replace("70.00 MiB", "0.00 MiB").replace("400.00 MiB", "0.00 MiB").replace(" 96.00", "  0.00")
    probe = probe.replace("19/19", "12/19").replace("50.00 MiB", "77.00 MiB")
    facts = only(probe + probe + MAIN + READY)
    assert (mib(facts, "weights"), mib(facts, "kv_cache"), mib(facts, "compute")) == (470.0, 96.0, 50.0)
    assert facts.layers_offloaded == 19


def test_a_load_that_failed_is_followed_by_one_without_a_marker() -> None:
    failing = MAIN.split("llama_kv_cache")[0] + (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 826.00 MiB on device 0: cudaMalloc failed: out of memory\n"
        "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache\n"
        "srv    load_model: failed to load model, '/models/a.gguf'\n"
    )
    first, second = loads(failing + MAIN.replace("a.gguf", "b.gguf") + READY)
    assert first.failed
    assert "cudaMalloc" in (first.failure or "")
    assert (second.model, second.failed, second.complete) == ("/models/b.gguf", False, True)
    assert mib(second, "weights") == 470.0


def test_a_load_that_was_cut_off_is_followed_by_another_model() -> None:
    first, second = loads(MAIN + MAIN.replace("a.gguf", "b.gguf") + READY)
    assert (first.model, first.complete, mib(first, "weights")) == ("/models/a.gguf", False, 470.0)
    assert (second.model, second.complete, mib(second, "weights")) == ("/models/b.gguf", True, 470.0)


def test_a_server_that_listens_for_http_is_not_ready() -> None:
    early = "main: HTTP server is listening, hostname: 127.0.0.1, port: 8080, http threads: 7\nmain: loading model\n"
    assert not only(early + MAIN).complete
    late = "main: server is listening on http://127.0.0.1:8080 - starting the main loop\n"
    assert only(early + MAIN + late).complete


def test_several_starts_of_a_server_in_one_log() -> None:
    start = "srv    load_model: loading model '/models/a.gguf'\n"
    first, second = loads(start + MAIN + READY + start + MAIN.replace("= 8192", "= 4096").replace(" 8192 cells", " 4096 cells"))
    assert (first.context_cells, first.complete) == (8192, True)
    assert (second.context_cells, second.complete) == (4096, False)


def test_a_draft_model_adds_weights_caches_and_compute() -> None:
    draft = "srv    load_model: loading draft model '/models/d.gguf'\n" + MAIN.replace("a.gguf", "d.gguf").replace(
        "19/19", "5/5"
    )
    facts = only(MAIN + draft + READY)
    assert (mib(facts, "weights"), mib(facts, "kv_cache"), mib(facts, "compute")) == (940.0, 192.0, 100.0)
    assert (facts.model, facts.layers_total, facts.context_cells) == ("/models/a.gguf", 19, 8192)


def test_contexts_of_slots_replace_the_one_that_a_draft_was_loaded_with() -> None:
    draft = "srv    load_model: loading draft model '/models/d.gguf'\n" + MAIN.replace("a.gguf", "d.gguf")
    slot = MAIN[MAIN.index("llama_context: constructing") :]
    facts = only(MAIN + draft + "srv          init: initializing slots, n_slots = 2\n" + slot + slot + READY)
    assert mib(facts, "kv_cache") == 3 * 96.0


def test_two_adapters_and_the_encoders_of_images_and_sound_add() -> None:
    more = (
        "llama_adapter_lora_init_impl:      CUDA0 LoRA buffer size =    12.50 MiB\n"
        * 2
        + "clip_ctx: CLIP using CUDA0 backend\nload_hparams: model size:         300.00 MiB\n"
        "reserve_compute_meta:      CUDA0 compute buffer size =    20.00 MiB\n"
        "reserve_compute_meta:      CUDA0 compute buffer size =    25.00 MiB\n"
        "clip_ctx: CLIP using CPU backend\nload_hparams: model size:         100.00 MiB\n"
        "reserve_compute_meta:        CPU compute buffer size =     5.00 MiB\n"
    )
    facts = only(MAIN + more + READY)
    assert (mib(facts, "lora"), mib(facts, "projector", "CUDA0"), mib(facts, "projector", "CPU")) == (25.0, 300.0, 100.0)
    assert (mib(facts, "compute", "CUDA0"), mib(facts, "compute", "CPU")) == (75.0, 5.0)
    assert mib(facts, "weights") == 470.0


def test_encoders_of_2024_name_a_kind_of_device_and_use_another_word() -> None:
    clip = (
        "clip_model_load: CLIP using CUDA backend\nclip_model_load: model size:     595.50 MB\n"
        "clip_model_load: params backend buffer size =  595.50 MB (377 tensors)\n"
        "clip_model_load: compute allocated memory: 32.75 MB\n"
    )
    facts = only(clip + MAIN + READY)
    assert (mib(facts, "projector", "CUDA0"), mib(facts, "compute", "CUDA0")) == (595.5, 82.75)


def test_caches_of_unknown_kinds_count() -> None:
    facts = only(MAIN.replace("llama_kv_cache:", "llama_kv_cache_of_tomorrow:"))
    assert (mib(facts, "kv_cache"), facts.context_cells, facts.kv_cache_type) == (96.0, 8192, "f16")


def test_two_rpc_servers_of_the_old_naming_stay_apart() -> None:
    both = "".join(f"load_tensors: RPC[10.0.0.{n}:50052] model buffer size =   100.00 MiB\n" for n in (1, 2))
    weights = "load_tensors:        CUDA0 model"
    assert set(only(MAIN.replace(weights, both + weights)).devices) >= {"RPC[10.0.0.1:50052]", "RPC[10.0.0.2:50052]"}


def test_a_cpu_only_log_is_no_full_offload_and_an_unfinished_one_is_unknown() -> None:
    host = MAIN.replace("CUDA0", "  CPU")
    assert only(host + READY).fully_offloaded is False
    assert only(MAIN[: MAIN.index("load_tensors:        CUDA0")]).fully_offloaded is None


WINDOWS = (
    'time=2025-09-09T10:00:00.000+02:00 level=INFO msg="starting runner" cmd="C:\\\\Users\\\\An A\\\\ollama.exe '
    'runner --model C:\\\\Users\\\\An A\\\\.ollama\\\\models\\\\blobs\\\\sha256-ab12 --port 54321"\r\n'
)


def test_a_windows_command_is_unquoted_with_the_spaces_of_its_path() -> None:
    facts = only(WINDOWS + MAIN.replace("\n", "\r\n"))
    assert facts.model == "C:\\Users\\An A\\.ollama\\models\\blobs\\sha256-ab12"
    assert facts.engine == "ollama"


S2 = (
    'time=2025-05-01T10:00:00Z level=INFO source=server.go:409 msg="starting llama server" cmd="/usr/bin/ollama runner '
    "--ollama-engine --model /m/sha256-cd --ctx-size 16384 --batch-size 512 --n-gpu-layers 27 --threads 8 --flash-attn "
    '--kv-cache-type q8_0 --parallel 2 --port 40001"\n'
    'time=2025-05-01T10:00:01Z level=INFO source=ggml.go:351 msg="model weights" buffer=CUDA0 size="2.3 GiB"\n'
    'time=2025-05-01T10:00:01Z level=INFO source=ggml.go:351 msg="model weights" buffer=CPU size="525.0 MiB"\n'
    'time=2025-05-01T10:00:02Z level=INFO msg="compute graph" backend=CUDA0 buffer_type=CUDA0 size="0 B"\n'
    'time=2025-05-01T10:00:02Z level=INFO msg="compute graph" backend=CUDA0 buffer_type=CUDA0 size="1.1 GiB"\n'
    'time=2025-05-01T10:00:02Z level=INFO msg="compute graph" backend=CPU buffer_type=CPU size="5.0 MiB"\n'
)


def test_the_go_engine_of_2025_05_says_its_settings_in_the_command_and_no_cache() -> None:
    facts = only(S2)
    assert (facts.dialect, facts.context_cells, facts.parallel, facts.num_batch) == ("ollama-go", 16384, 2, 512)
    assert (facts.kv_cache_type, facts.flash_attention, facts.estimated) == ("q8_0", "enabled", False)
    assert (mib(facts, "kv_cache"), mib(facts, "compute", "CUDA0"), mib(facts, "compute", "CPU")) == (None, 1126.4, 5.0)


def test_allocated_bytes_at_debug_are_exact_and_name_the_cache() -> None:
    exact = (
        "time=2025-05-01T10:00:03Z level=DEBUG msg=memory allocated.InputWeights=550502400A "
        'allocated.CPU.Graph=5242880A allocated.CUDA0.Weights="[1000000000A 1500000000A]" '
        'allocated.CUDA0.Cache="[1000A 0U 24A]" allocated.CUDA0.Graph=1181116006A\n'
    )
    facts = only(S2 + exact)
    assert facts.total("kv_cache_bytes") == 1024
    assert facts.devices["CUDA0"].weights_bytes == 2_500_000_000
    assert facts.devices["CPU"].weights_bytes == 550_502_400
    assert facts.uncertainty_bytes == 0


def go(part: str, device: str, size: str, level: str = "INFO") -> str:
    return f'time=2026-01-01T00:00:00Z level={level} source=device.go:240 msg="{part}" device={device} size="{size}"\n'


def test_a_layout_that_is_printed_again_replaces_the_one_before() -> None:
    start = 'time=2026-01-01T00:00:00Z level=INFO msg="starting runner" cmd="/o runner --ollama-engine --model /m/a"\n'
    first = go("model weights", "CUDA0", "2.0 GiB") + go("model weights", "CUDA1", "2.0 GiB")
    first += go("kv cache", "CUDA1", "1.0 GiB")
    second = go("model weights", "CUDA0", "4.0 GiB") + go("kv cache", "CUDA0", "900.0 MiB")
    facts = only(start + first + second)
    assert set(facts.devices) == {"CUDA0"}
    assert mib(facts, "weights") == 4096.0


def test_a_retry_with_the_projector_on_the_host_is_a_load_of_its_own() -> None:
    start = (
        'time=2026-09-02T16:52:34Z level=INFO source=llama_server.go:433 msg="starting llama-server" cmd="/usr/lib/ollama/'
        'llama-server --model /m/sha256-aa --port 1 -c 8192 -np 1 --mmproj /m/p{} --flash-attn auto -b 512 -ub 512"\n'
    )
    failed = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 826.00 MiB on device 0: cudaMalloc failed: out of memory\n"
    retry = (
        'time=2026-09-02T16:52:40Z level=WARN source=llama_server.go:1091 msg="llama-server startup failed with projector GPU '
        'offload; retrying with projector CPU offload" error="llama-server process has terminated: exit status 1"\n'
    )
    second = MAIN + "clip_ctx: CLIP using CPU backend\nload_hparams: model size:         300.00 MiB\n"
    done = 'time=2026-09-02T16:52:50Z level=INFO source=l.go:1 msg="llama-server started in 9.50 seconds"\n'
    first, last = loads(start.format("") + MAIN + failed + retry + start.format(" --no-mmproj-offload") + second + done)
    assert (first.failed, first.complete) == (True, False)
    assert (last.failed, last.complete) == (False, True)
    assert (mib(last, "weights"), mib(last, "projector", "CPU")) == (470.0, 300.0)
    rotated = MAIN + failed + retry + second + done
    assert mib(only(rotated), "weights") == 470.0


def test_a_log_that_ends_right_after_its_start_tells_of_that_load() -> None:
    facts = only(WINDOWS)
    assert (facts.complete, facts.failed, facts.devices) == (False, False, {})


def test_a_pass_for_tokens_only_is_no_load() -> None:
    tokens = (
        "llama_model_loader: loaded meta data with 33 key-value pairs and 236 tensors from /m/a (version GGUF V3 (latest))\n"
        "llama_model_load: vocab only - skipping tensors\n"
    )
    assert len(loads(tokens + WINDOWS + MAIN + READY + tokens + "CUDA error: out of memory\n")) == 1


def test_progress_dots_before_a_line_of_slog_hide_nothing() -> None:
    started = 'time=2026-01-01T00:00:00Z level=INFO source=s.go:1 msg="llama runner started in 2.50 seconds"\n'
    facts = only(WINDOWS + MAIN + "......................" + started)
    assert (facts.complete, facts.load_seconds) == (True, 2.5)


OLDEST = """\
2023/10/11 15:42:08 llama.go:313: starting llama runner
2023/10/11 15:42:08 llama.go:349: waiting for llama runner to start responding
ggml_init_cublas: found 1 CUDA devices:
llama_model_loader: loaded meta data with 16 key-value pairs and 291 tensors from /m/sha256-6a (version GGUF V2 (latest))
llm_load_tensors: ggml ctx size =    0.09 MB
llm_load_tensors: using CUDA for GPU acceleration
llm_load_tensors: mem required  =   70.50 MB (+ 1024.00 MB per state)
llm_load_tensors: offloading 32 repeating layers to GPU
llm_load_tensors: offloading non-repeating layers to GPU
llm_load_tensors: offloading v cache to GPU
llm_load_tensors: offloading k cache to GPU
llm_load_tensors: offloaded 35/35 layers to GPU
llm_load_tensors: VRAM used: 4672 MB
....................................................................................................
llama_new_context_with_model: n_ctx      = 2048
llama_new_context_with_model: kv self size  = 1024.00 MB
llama_new_context_with_model: compute buffer total size =  159.00 MB
llama_new_context_with_model: VRAM scratch buffer: 156.00 MB

llama server listening at http://127.0.0.1:59123

2023/10/11 15:42:12 llama.go:365: llama runner started in 4.200530 seconds
"""


def test_the_sums_of_2023_are_taken_apart() -> None:
    facts = only(OLDEST)
    assert (facts.engine, facts.dialect, facts.complete) == ("ollama", "ollama-llama.cpp", True)
    assert (facts.context_cells, facts.layers_offloaded, facts.fully_offloaded) == (2048, 35, True)
    assert (mib(facts, "weights", "CUDA0"), mib(facts, "kv_cache", "CUDA0"), mib(facts, "compute", "CUDA0")) == (
        3648,
        1024,
        156,
    )
    assert (mib(facts, "weights", "CPU"), mib(facts, "kv_cache", "CPU"), mib(facts, "compute", "CPU")) == (70.5, None, 159)


def test_a_cache_that_stays_on_the_host_in_2023_is_seen_there() -> None:
    text = OLDEST.replace("llm_load_tensors: offloading v cache to GPU\n", "").replace(
        "llm_load_tensors: offloading k cache to GPU\n", ""
    )
    facts = only(text.replace("35/35", "30/35"))
    assert (mib(facts, "weights", "CUDA0"), mib(facts, "kv_cache", "CPU")) == (4672, 1024)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda line: f"Aug 27 23:56:51 host ollama[1502099]: {line}\n",
        lambda line: f"6月 26 11:22:33 host llama[7]: {line}\n",
        lambda line: f"ollama-1  | {line}\n",
        lambda line: f"2026-05-14 22:14:30.967 | {line}\n",
        lambda line: f"[54321] {line}\n",
        lambda line: f"2026-01-02T03:04:05.123456789Z stderr F {line}\n",
        lambda line: f"2026-01-02T03:04:05.123456789Z {line}\n",
        lambda line: f"0.00.123.456 I {line}\n",
        lambda line: f"\x1b[32m0.00.123.456 I {line}\x1b[0m\n",
        lambda line: json.dumps({"log": f"{line}\r\n", "stream": "stderr"}) + "\n",
        lambda line: json.dumps({"__CURSOR": "s=1", "MESSAGE": line}) + "\n",
        lambda line: f"{line}\r\n",
    ],
)
def test_whatever_a_log_is_wrapped_in_changes_nothing(wrap: object) -> None:
    served = 'slot print_timing: id  0 | task 3 | \n[GIN] 2026/09/02 - 16:01:23 | 200 | 5s | 127.0.0.1 | POST "/api/chat"\n'
    text = "srv    load_model: loading model '/models/a.gguf'\n" + MAIN + READY + served
    plain = [facts.to_json() for facts in parse_log(text)]
    wrapped = [facts.to_json() for facts in parse_log("".join(wrap(line) for line in text.splitlines()))]  # type: ignore[operator]
    for load in wrapped + plain:
        del load["engine"], load["dialect"], load["wrapping"]
    assert wrapped == plain


def test_a_quiet_log_tells_that_a_model_is_ready_and_for_how_many_tokens() -> None:
    quiet = (
        "0.00.155.981 I srv    load_model: loading model 'F:/Models/a.gguf'\n"
        "0.01.207.100 I srv    load_model: initializing, n_slots = 2, n_ctx_slot = 4096, kv_unified = 'false'\n"
        "0.01.227.385 I srv  llama_server: model loaded\n"
    )
    facts = only(quiet)
    assert (facts.model, facts.complete, facts.parallel, facts.context_cells) == ("F:/Models/a.gguf", True, 2, 8192)
    assert (facts.devices, facts.fully_offloaded) == ({}, None)


def test_a_pass_for_tokens_does_not_hide_what_was_cut_off_before_it() -> None:
    tokens = MAIN.splitlines(keepends=True)[0] + "llama_model_load: vocab only - skipping tensors\n"
    first, second = loads(MAIN + tokens + WINDOWS + MAIN + READY)
    assert (first.complete, mib(first, "weights"), mib(first, "kv_cache")) == (False, 470.0, 96.0)
    assert (second.complete, mib(second, "weights"), mib(second, "kv_cache")) == (True, 470.0, 96.0)


def test_a_layout_that_could_not_be_allocated_is_tried_smaller_in_the_same_load() -> None:
    start = 'time=2026-01-01T00:00:00Z level=INFO msg="starting runner" cmd="/o runner --ollama-engine --model /m/a"\n'
    request = 'time=x level=INFO msg=load request="{{Operation:{} Parallel:1 BatchSize:512 KvSize:8192 KvCacheType:}}"\n'
    oom = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 1.00 MiB on device 0: cudaMalloc failed: out of memory\n"
    evict = (
        'time=x level=INFO msg="model requires more gpu memory than is currently available, evicting a model to make space"\n'
    )
    stale = go("model weights", "CUDA0", "4.0 GiB") + go("kv cache", "CUDA0", "900.0 MiB")
    good = go("model weights", "CUDA0", "3.0 GiB") + go("kv cache", "CUDA0", "700.0 MiB")
    done = 'time=x level=INFO msg="llama runner started in 2.50 seconds"\n'
    facts = only(start + request.format("alloc") + oom + stale + evict + request.format("commit") + good + done)
    assert (facts.model, facts.complete, facts.failed, mib(facts, "weights")) == ("/m/a", True, False, 3072.0)
    failed = 'time=x level=INFO msg="Load failed" model=/m/a error="memory layout cannot be allocated"\n'
    facts = only(start + request.format("alloc") + oom + stale + failed)
    assert (facts.model, facts.failed, facts.failure) == ("/m/a", True, oom.strip())


def test_buffers_that_are_printed_after_a_timeout_belong_to_the_load_that_was_given_up() -> None:
    timeout = 'time=x level=ERROR msg="error loading llama server" error="timed out waiting for llama runner to start"\n'
    facts = only(WINDOWS + timeout + MAIN)
    assert (facts.failed, facts.complete, mib(facts, "weights")) == (True, False, 470.0)
    missing = (
        "srv    load_model: loading model '/models/none.gguf'\n"
        "gguf_init_from_file: failed to open GGUF file '/models/none.gguf' (No such file or directory)\n"
    )
    first, second = loads(missing + "srv    load_model: loading model '/models/a.gguf'\n" + MAIN + READY)
    assert (first.model, first.failed, first.devices) == ("/models/none.gguf", True, {})
    assert (second.model, second.complete, second.failed) == ("/models/a.gguf", True, False)


def test_memory_of_a_gpu_is_no_memory_of_a_load() -> None:
    assert loads("ggml_cuda_init: found 1 CUDA devices (Total VRAM: 24112 MiB):\n" + READY) == []


def test_figures_that_only_the_go_engine_prints_are_no_estimates() -> None:
    assert only(go("kv cache", "CUDA0", "1.9 GiB")).estimated
    assert not only(go("kv cache", "CUDA0", "1.9 GiB", level="DEBUG")).estimated
    layers = 'time=x level=INFO source=ggml.go:494 msg="offloaded 0/41 layers to GPU"\n'
    facts = only(layers + go("kv cache", "CPU", "1.6 GiB"))
    assert (facts.dialect, facts.estimated, facts.layers_offloaded, facts.fully_offloaded) == ("ollama-go", False, 0, False)


def test_a_library_of_the_server_itself_has_markers_of_its_own() -> None:
    begin = "2024/01/10 09:00:00 ext_server_common.go:136: Initializing internal llama server\n"
    ready = "2024/01/10 09:00:05 ext_server_common.go:144: Starting internal llama main loop\n"
    first, second = loads(begin + MAIN + begin + MAIN + ready)
    assert (first.engine, first.complete, second.engine, second.complete) == ("ollama", False, "ollama", True)
    assert mib(first, "kv_cache") == mib(second, "kv_cache") == 96.0


def test_a_model_of_embeddings_has_no_cache_and_its_context_for_a_batch() -> None:
    """Ollama 0.11.5 to 0.24, runner/ollamarunner: the batch of the request is not the one that is reserved for."""
    request = (
        'level=INFO msg=load request="{Operation:commit LoraPath:[] Parallel:1 BatchSize:512 FlashAttention:Disabled '
        'KvSize:2048 KvCacheType: NumThreads:8 GPULayers:13[ID:GPU-a Layers:13(0..12)]}"\n'
    )
    facts = only(
        'level=INFO msg="starting runner" cmd="/usr/bin/ollama runner --ollama-engine --model /b/sha256-1 --port 1"\n'
        + 'level=WARN msg="model does not support caching, setting batch size to context length" batch_size=2048\n'.join(
            (request, "")
        )
        + go("model weights", "CUDA0", "260.9 MiB")
        + go("model weights", "CPU", "44.7 MiB")
        + go("compute graph", "CUDA0", "256.0 MiB")
        + 'level=INFO msg="llama runner started in 0.82 seconds"\n'
    )
    assert (facts.num_batch, facts.total("kv_cache_bytes")) == (2048, 0)


def test_timings_show_that_a_program_without_a_ready_line_was_ready() -> None:
    """llama-cli and llama-bench print no ready line; of Ollama, timings may be those of a runner beside the load."""
    timed = "llama_perf_context_print: prompt eval time =     173.33 ms /     9 tokens\n"
    assert not only(MAIN).complete
    assert only(MAIN + timed).complete
    assert only(MAIN + "Load Text Model OK: True\n").complete  # koboldcpp
    assert not only(MAIN.partition("sched_reserve")[0] + timed).complete
    assert not only(MAIN.replace("/models/a.gguf", "/root/.ollama/models/blobs/sha256-" + "ab" * 32) + timed).complete


def test_a_device_may_be_named_by_several_words() -> None:
    """Vulkan's buffers of ik_llama.cpp (ggml-vulkan.cpp, 2025-07) have the product's name."""
    text = MAIN.replace("     CUDA0 ", " AMD Radeon RX 7900 XTX (RADV NAVI31) ")
    name = "AMD Radeon RX 7900 XTX (RADV NAVI31)"
    facts = only(text + READY)
    assert [mib(facts, part, name) for part in ("weights", "kv_cache", "compute")] == [400.0, 96.0, 50.0]
    assert facts.fully_offloaded


def test_compressor_states_add_to_what_no_context_makes_longer_and_new_kinds_are_unread() -> None:
    """llama.cpp src/llama-kv-cache-dsv4.cpp, since b11000 or so (DeepSeek V4)."""
    state = "llama_dsv4_comp_state:      CUDA0 DSV4 {} state buffer size = {:8.2f} MiB\n"
    text = MAIN.replace("sched_reserve: Flash", state.format("csa", 1.31) + state.format("hca", 10.0) + "sched_reserve: Flash")
    facts = only(text + READY)
    assert (mib(facts, "recurrent", "CUDA0"), facts.unread.count) == (11.31, 0)
    facts = only(MAIN + "llama_new_thing:      CUDA0 index table buffer size =    70.00 MiB\n" + READY)
    assert (mib(facts, "weights", "CUDA0"), facts.unread.count) == (400.0, 1)


def test_a_program_that_names_itself_before_a_line_names_no_device() -> None:
    """Android's log: with one blank after llama.cpp's function, that function was read as the first word of a device."""
    (facts,) = parse_log(
        "I Chat: load_tensors: offloaded 5/33 layers to GPU\n"
        "I Chat: load_tensors:      Vulkan0 model buffer size =   662.50 MiB\n"
        "I Chat: llama_kv_cache:    Vulkan0 KV buffer size =    15.00 MiB\n"
        "I Chat: llama_context:    Vulkan0 compute buffer size =     0.59 MiB\n"
        "I Chat: llama_context: Vulkan_Host compute buffer size =     1.01 MiB\n"
    )
    assert {name: device.kind for name, device in facts.devices.items()} == {"Vulkan0": "gpu", "Vulkan_Host": "host"}
