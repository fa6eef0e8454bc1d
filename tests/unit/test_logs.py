"""What each generation of logs says; the lines are written to the documented formats with figures of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.logs import LogReader, parse_log
from harness.model.facts import LoadFacts
from harness.units import MIB

GOLDEN = Path(__file__).parents[1] / "golden"


def only(text: str) -> LoadFacts:
    (facts,) = parse_log(text)
    return facts


def mib(facts: LoadFacts, part: str, kind: str | None = None) -> float | None:
    size = facts.total(part, kind)  # type: ignore[arg-type]
    return None if size is None else round(size / MIB, 2)


#: Builds whose ready line is not read yet.
UNREADY = {"b9713", "b10068", "b10566", "b11063", "b11549"}


@pytest.mark.parametrize("log", sorted(GOLDEN.rglob("*.log")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_logs_say_what_was_read_off_by_hand(log: Path) -> None:
    expected = json.loads(log.with_suffix(".json").read_text())
    loads = json.loads(json.dumps([facts.to_json() for facts in parse_log(log.read_bytes())]))
    if log.parent.name in UNREADY and loads != expected["loads"]:
        pytest.xfail("the ready line of this build is not read")
    assert loads == expected["loads"]


WINDOW = """\
load_tensors: offloaded 19/19 layers to GPU
load_tensors:   CPU_Mapped model buffer size =   170.00 MiB
load_tensors:        CUDA0 model buffer size =    65.16 MiB
llama_context: constructing llama_context
llama_context: n_seq_max             = 2
llama_context: n_ctx                 = 8192
llama_context: n_ubatch              = 512
llama_context: flash_attn            = auto
llama_context:  CUDA_Host  output buffer size =     2.00 MiB
llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells
llama_kv_cache:      CUDA0 KV buffer size =    24.00 MiB
llama_kv_cache: size =   24.00 MiB (  4096 cells,   3 layers,  2/2 seqs), K (f16):   12.00 MiB, V (f16):   12.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1024 cells
llama_kv_cache:      CUDA0 KV buffer size =    30.00 MiB
llama_kv_cache: size =   30.00 MiB (  1024 cells,  15 layers,  2/2 seqs), K (f16):   15.00 MiB, V (f16):   15.00 MiB
resolve_fused_ops: Flash Attention enabled
sched_reserve:      CUDA0 compute buffer size =    21.52 MiB
sched_reserve:  CUDA_Host compute buffer size =     7.52 MiB
srv  llama_server: model loaded
"""


def test_caches_of_a_sliding_window_add() -> None:
    facts = only(WINDOW)
    assert mib(facts, "kv_cache_bytes", "gpu") == 54.0
    assert facts.context_cells == 8192
    assert facts.parallel == 2
    assert facts.flash_attention == "enabled"
    assert facts.fully_offloaded is True
    assert facts.complete


def test_a_fit_probe_is_dropped_with_its_compute() -> None:
    probe = """\
load_tensors:        CUDA0 model buffer size =     0.00 MiB
llama_context: constructing llama_context
llama_kv_cache:      CUDA0 KV buffer size =     0.00 MiB
llama_memory_recurrent:      CUDA0 RS buffer size =    90.40 MiB
sched_reserve:      CUDA0 compute buffer size =   999.00 MiB
"""
    facts = only(probe + WINDOW)
    assert mib(facts, "compute_bytes", "gpu") == 21.52
    assert mib(facts, "recurrent_bytes") is None
    assert parse_log(probe) == []


def test_compute_reserved_again_replaces() -> None:
    again = WINDOW.replace(
        "srv  llama_server", "sched_reserve:      CUDA0 compute buffer size =    33.00 MiB\nsrv  llama_server"
    )
    assert mib(only(again), "compute_bytes", "gpu") == 33.0


def test_a_draft_context_adds() -> None:
    draft = WINDOW.replace(
        "srv  llama_server",
        "common_speculative_init_result: creating MTP draft context against the target model 'm'\n"
        "llama_context: n_ctx                 = 8192\n"
        "llama_kv_cache:      CUDA0 KV buffer size =     8.00 MiB\n"
        "llama_kv_cache: size =    8.00 MiB (  4096 cells,   1 layers,  2/2 seqs), K (f16):    4.00 MiB, V (f16):    4.00 MiB\n"
        "sched_reserve:      CUDA0 compute buffer size =     5.00 MiB\n"
        "sched_reserve:      CUDA0 compute buffer size =     5.00 MiB\n"
        "srv  llama_server",
    )
    facts = only(draft)
    assert mib(facts, "kv_cache_bytes", "gpu") == 62.0
    assert mib(facts, "compute_bytes", "gpu") == 26.52


def test_different_types_of_k_and_v_are_both_named() -> None:
    assert only(WINDOW.replace("K (f16)", "K (q8_0)")).kv_cache_type == "q8_0/f16"


def test_layers_whose_experts_overflow_are_no_full_offload() -> None:
    fit = (
        "common_params_fit_impl: cannot meet free memory target of 1024 MiB, need to reduce device memory by 700 MiB\n"
        "common_params_fit_impl:   - CUDA0 (NVIDIA X): 19 layers ( 7 overflowing),  11065 MiB used,   1036 MiB free\n"
    )
    facts = only(fit + WINDOW)
    assert facts.layers_overflowing == 7
    assert facts.fully_offloaded is False


def test_a_cache_on_the_host_is_no_full_offload() -> None:
    facts = only(WINDOW.replace("CUDA0 KV buffer size =    24.00", "  CPU KV buffer size =    24.00"))
    assert facts.fully_offloaded is False


def test_an_rpc_device_is_named_without_its_address() -> None:
    assert set(only(WINDOW.replace("  CUDA0", "  RPC0[127.0.0.1:50199]")).devices) == {"CPU_Mapped", "RPC0", "CUDA_Host"}


def test_colours_journald_carriage_returns_and_dots_change_nothing() -> None:
    plain = [load.devices for load in parse_log(WINDOW)]
    coloured = "".join(f"\x1b[32m{line}\x1b[0m\r\n" for line in WINDOW.splitlines())
    dotted = WINDOW.replace("llama_context: constructing", "........llama_context: constructing")
    assert [load.devices for load in parse_log(coloured)] == plain
    assert [load.devices for load in parse_log(dotted)] == plain
    journal = "".join(f"6月 26 11:22:33 host llama[7]: {line}\n" for line in WINDOW.splitlines())
    assert [load.devices for load in parse_log(journal)] == plain
    docker = "".join(json.dumps({"log": line + "\n", "stream": "stderr"}) + "\n" for line in WINDOW.splitlines())
    assert [load.devices for load in parse_log(docker)] == plain


def test_a_failed_load_says_why() -> None:
    failing = WINDOW.split("llama_kv_cache_iswa")[0] + (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 826.00 MiB on device 0: cudaMalloc failed: out of memory\n"
        "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache\n"
    )
    facts = only(failing)
    assert facts.failed
    assert not facts.complete
    assert "cudaMalloc failed" in (facts.failure or "")


S4 = """\
time=2026-05-05T01:30:33.795+08:00 level=INFO source=server.go:432 msg="starting runner" cmd="/usr/bin/ollama runner --model /m/blobs/sha256-ab --port 44344"
time=2026-05-05T01:30:33.796+08:00 level=INFO source=device.go:240 msg="model weights" device=CUDA0 size="4.1 GiB"
time=2026-05-05T01:30:33.796+08:00 level=INFO source=device.go:251 msg="kv cache" device=CUDA0 size="1.8 GiB"
time=2026-05-05T01:30:33.796+08:00 level=INFO source=device.go:262 msg="compute graph" device=CUDA0 size="1.8 GiB"
time=2026-05-05T01:30:33.813+08:00 level=INFO source=runner.go:965 msg="starting go runner"
"""


def test_estimates_before_the_runner_never_pass_for_measurements() -> None:
    assert only(S4).estimated
    truth = S4 + "load_tensors: offloaded 29/29 layers to GPU\nload_tensors:        CUDA0 model buffer size =  4168.09 MiB\n"
    facts = only(truth)
    assert not facts.estimated
    assert mib(facts, "weights_bytes", "gpu") == 4168.09
    assert mib(facts, "kv_cache_bytes") is None


S3 = """\
time=2026-04-09T23:17:19Z level=INFO source=server.go:1 msg="starting runner" cmd="/usr/bin/ollama runner --ollama-engine --model /m/sha256-cd --port 1"
time=2026-04-09T23:17:19Z level=INFO source=r.go:1 msg=load request="{Operation:fit LoraPath:[] Parallel:1 BatchSize:1024 FlashAttention:Enabled KvSize:32768 KvCacheType:q8_0 NumThreads:8}"
time=2026-04-09T23:17:20Z level=INFO source=r.go:1 msg=load request="{Operation:commit LoraPath:[] Parallel:1 BatchSize:1024 FlashAttention:Enabled KvSize:32768 KvCacheType:q8_0 NumThreads:8}"
time=2026-04-09T23:17:20Z level=INFO source=device.go:240 msg="model weights" device=CUDA0 size="19.9 GiB"
time=2026-04-09T23:17:20Z level=INFO source=ggml.go:494 msg="offloaded 49/49 layers to GPU"
time=2026-04-09T23:17:20Z level=INFO source=device.go:251 msg="kv cache" device=CUDA0 size="955.2 MiB"
time=2026-04-09T23:17:20Z level=INFO source=device.go:262 msg="compute graph" device=CUDA0 size="918.1 MiB"
time=2026-04-09T23:17:21Z level=INFO source=server.go:1 msg="llama runner started in 2.50 seconds"
"""


def test_the_go_engine_s_figures_carry_their_rounding() -> None:
    facts = only(S3)
    assert (facts.engine, facts.dialect) == ("ollama", "ollama-go")
    assert facts.kv_cache_type == "q8_0"
    assert facts.context_cells == 32768
    assert mib(facts, "kv_cache_bytes", "gpu") == 955.2
    assert facts.uncertainty_bytes == pytest.approx(51.2 * MIB, rel=0.01)
    assert facts.complete


def test_exact_bytes_at_debug_replace_rounded_figures() -> None:
    exact = (
        "time=2026-04-09T23:17:20Z level=DEBUG source=r.go:1 msg=memory success=true required.CUDA0.ID=GPU-1 "
        'required.CUDA0.Weights="[1000 2000]" required.CUDA0.Cache="[300 400]" required.CUDA0.Graph=50\n'
    )
    facts = only(
        S3.replace("time=2026-04-09T23:17:20Z level=INFO source=device.go:240", exact + "time=x level=INFO source=d.go:1")
    )
    assert facts.total("kv_cache_bytes") == 700
    assert facts.uncertainty_bytes == 0


def test_runners_that_only_look_for_gpus_are_no_loads() -> None:
    discovery = 'time=2026-05-05T01:30:33Z level=INFO source=s.go:1 msg="starting runner" cmd="/usr/bin/ollama runner --ollama-engine --port 5"\n'
    assert parse_log(discovery) == []


def test_two_loads_in_one_log_stay_apart_and_in_order() -> None:
    first, second = parse_log(S3 + S3.replace("KvSize:32768", "KvSize:16384"))
    assert (first.context_cells, second.context_cells) == (32768, 16384)


def test_two_raw_loads_without_a_marker_keep_their_own_layers() -> None:
    first, second = parse_log(WINDOW + WINDOW.replace("19/19", "7/19"))
    assert (first.layers_offloaded, second.layers_offloaded) == (19, 7)


def test_old_estimates_are_not_figures() -> None:
    line = (
        'time=2024-08-30T04:40:18Z level=INFO source=memory.go:309 msg="offload to cuda" layers.model=33 '
        'memory.required.kv="1.0 GiB" memory.graph.full="560.0 MiB"\n'
    )
    assert parse_log(line) == []


@given(st.binary(max_size=4096))
@settings(max_examples=300)
def test_any_bytes_are_read_without_an_exception(data: bytes) -> None:
    for facts in parse_log(data):
        facts.to_json()


@given(st.lists(st.integers(1, 200), max_size=40), st.sampled_from([WINDOW, S3, S4, WINDOW + S3]))
def test_where_a_log_is_cut_into_chunks_changes_nothing(sizes: list[int], text: str) -> None:
    reader, data = LogReader(), text.encode()
    for size in sizes:
        reader.feed(data[:size])
        data = data[size:]
    reader.feed(data)
    assert reader.finish().loads == parse_log(text)


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_log_is_read_without_an_exception(data: st.DataObject) -> None:
    lines = (WINDOW + S3 + S4).splitlines(keepends=True)
    picked = data.draw(st.lists(st.sampled_from(lines), max_size=60))
    noise = data.draw(st.binary(max_size=64)).decode("latin-1")
    text = "".join(line[: data.draw(st.integers(0, len(line)))] + noise if len(line) % 3 == 0 else line for line in picked)
    for facts in parse_log(text):
        facts.to_json()


def test_a_line_of_fifty_megabytes_is_one_line() -> None:
    reader = LogReader()
    for _ in range(50):
        reader.feed(b"CUDA0 KV buffer size = " * 45590)
    reader.feed(b"\n" + WINDOW.encode())
    loads = reader.finish().loads
    assert mib(loads[-1], "kv_cache_bytes", "gpu") == 54.0


@pytest.mark.parametrize(
    "line",
    [
        "llama_context: n_ctx = ²",
        "llama_context: n_ctx = " + "9" * 5000,
        "common_memory_breakdown_print: |   - CUDA0 (X) | " + "9" * 5000 + " = 1 + (1 = 1 + 0 + 0) + 0 | MiB",
        "common_params_fit_impl: projected to use " + "9" * 5000 + " MiB of device memory vs. 1 MiB of free device memory",
        'time=x level=INFO msg="kv cache" device=CUDA0 size="' + "9" * 5000 + ' GiB"',
        'time=x level=INFO msg=load request="{Operation:commit KvSize:² Parallel:' + "9" * 5000 + '}"',
        "time=x level=DEBUG msg=memory success=true required.CUDA0.Graph=" + "9" * 5000,
    ],
    ids=lambda line: line[:30],
)
def test_numbers_that_are_none_raise_nothing(line: str) -> None:
    parse_log(line)
    assert parse_log(line + "\n" + WINDOW)[-1].complete


def test_overflow_is_seen_on_a_device_whose_address_has_a_colon() -> None:
    log = (
        "common_params_fit_impl:   - RPC0 (127.0.0.1:50525): 13 layers,    436 MiB used,  23668 MiB free\n"
        "common_params_fit_impl:   - RPC0 (127.0.0.1:50525): 13 layers (11 overflowing),    496 MiB used,  23608 MiB free\n"
        "load_tensors: offloaded 13/13 layers to GPU\n"
        "load_tensors: RPC0[127.0.0.1:50525] model buffer size =   278.00 MiB\n"
    )
    assert [load.layers_overflowing for load in parse_log(log)] == [11]
