"""What a log says twice, what it lacks, and what of it is not understood."""

from __future__ import annotations

import json

import pytest

from harness.fit.observations import spill_reason
from harness.logs import LogReading, missing, parse_log, read_chunks, unreadable
from harness.model.facts import LoadFacts
from harness.units import MIB

FIT = """\
common_params_fit_impl: getting device memory data for initial parameters:
common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
common_memory_breakdown_print: |   - CUDA0 (Test A)     | 24110 = 22900 + (6021 =  4437 +    1024 +     560) +       -4811 |
common_memory_breakdown_print: |   - Host               |                   305 =   281 +       0 +      24                |
common_params_fit_impl: projected to use 6021 MiB of device memory vs. 22900 MiB of free device memory
common_params_fit_impl: will leave 16879 >= 1024 MiB of free device memory, no changes needed
"""
LOAD = """\
load_tensors: offloaded 33/33 layers to GPU
load_tensors:   CPU_Mapped model buffer size =   281.81 MiB
load_tensors:        CUDA0 model buffer size =  4437.80 MiB
llama_context: n_seq_max     = 1
llama_context: n_ctx         = 8192
llama_kv_cache:      CUDA0 KV buffer size =  1024.00 MiB
llama_kv_cache: size = 1024.00 MiB (  8192 cells,  32 layers,  1/1 seqs), K (f16):  512.00 MiB, V (f16):  512.00 MiB
sched_reserve:      CUDA0 compute buffer size =   560.00 MiB
sched_reserve:  CUDA_Host compute buffer size =    24.01 MiB
"""
READY = "srv  llama_server: model loaded\n"
EXIT = "".join(FIT.splitlines(keepends=True)[1:4])


def only(text: str) -> LoadFacts:
    (facts,) = parse_log(text)
    return facts


def reading(text: str) -> LogReading:
    return read_chunks([text.encode()])


def test_a_log_that_agrees_with_itself_says_which_checks_agreed() -> None:
    facts = only(FIT + LOAD + READY + EXIT)
    assert facts.doubts == ()
    assert set(facts.checked) == {"cache-size", "cache-halves", "cache-elements", "held-table", "projection"}
    assert spill_reason(facts, "gpu") is None


@pytest.mark.parametrize(
    ("before", "after", "check"),
    [
        ("CUDA0 KV buffer size =  1024.00", "CUDA0 KV buffer size =  2048.00", "cache-size"),
        ("V (f16):  512.00", "V (f16):  256.00", "cache-halves"),
        ("8192 cells", "8190 cells", "cache-elements"),
        ("560) +", "610) +", "held-table"),
        ("projected to use 6021", "projected to use 7021", "projection"),
    ],
)
def test_a_load_whose_log_contradicts_itself_is_doubtful_and_no_point(before: str, after: str, check: str) -> None:
    facts = only((FIT + LOAD + READY + EXIT).replace(before, after))
    assert check in {doubt.partition(":")[0] for doubt in facts.doubts}
    assert check not in facts.checked
    assert "contradicts itself" in str(spill_reason(facts, "gpu"))


def test_a_cache_whose_device_is_not_logged_is_known_in_sum() -> None:
    facts = only(LOAD.replace("llama_kv_cache:      CUDA0 KV buffer size =  1024.00 MiB\n", ""))
    assert facts.total("kv_cache_bytes") == 1024 * MIB
    assert [doubt.partition(":")[0] for doubt in facts.doubts] == ["placement"]


def test_buffers_of_a_split_by_tensors_are_no_sums() -> None:
    facts = only(LOAD.replace(" CUDA0", "Meta()") + READY)
    assert facts.total("weights_bytes", "gpu") is None
    assert facts.total("compute_bytes", "gpu") is None
    assert facts.total("kv_cache_bytes") == 1024 * MIB
    assert facts.doubts


def test_two_servers_of_remote_devices_are_told_apart_by_their_addresses() -> None:
    far = "load_tensors: RPC0[10.0.0.{}:50052] model buffer size =   100.00 MiB\n"
    text = far.format(1) + far.format(2) + "sched_reserve: RPC0[10.0.0.2:50052] compute buffer size =    25.00 MiB\n"
    devices = only(text).devices
    assert {name: device.address for name, device in devices.items()} == {"RPC0": "10.0.0.1:50052", "RPC1": "10.0.0.2:50052"}
    assert devices["RPC1"].compute_bytes == 25 * MIB
    named = "llama_prepare_model_devices: using device RPC3 (10.0.0.2:50052) (unknown id) - 24105 MiB free\n"
    assert set(only(named + text).devices) == {"RPC0", "RPC3"}


def test_a_projection_alone_is_an_estimate_of_each_device() -> None:
    facts = only(FIT)
    assert (facts.estimated, facts.complete) == (True, False)
    assert facts.devices["CUDA0"].weights_bytes == 4437 * MIB + MIB // 2
    assert facts.uncertainty_bytes == MIB // 2
    assert facts.to_json()["projection"] == {
        "devices": {
            "CUDA0": {
                "total_bytes": 24110 * MIB,
                "free_bytes": 22900 * MIB,
                "self_bytes": 6021 * MIB,
                "model_bytes": 4437 * MIB,
                "context_bytes": 1024 * MIB,
                "compute_bytes": 560 * MIB,
            },
            "Host": {
                "total_bytes": None,
                "free_bytes": None,
                "self_bytes": 305 * MIB,
                "model_bytes": 281 * MIB,
                "context_bytes": 0,
                "compute_bytes": 24 * MIB,
            },
        },
        "projected_bytes": 6021 * MIB,
        "free_bytes": 22900 * MIB,
        "target_bytes": 1024 * MIB,
    }
    assert "--log-verbosity 4" in str(missing(facts))


def test_structured_breakdowns_are_a_projection_and_then_what_was_held() -> None:
    def record(free: int, own: int, model: int) -> str:
        row = {"kind": "device", "name": "CUDA0", "description": "Test A", "total": 24000, "free": free, "self": own}
        return json.dumps(
            {"type": "fit_memory_breakdown", "data": {"rows": [{**row, "model": model, "context": 30, "compute": 20}]}}
        )

    start = json.dumps({"type": "log", "msg": "srv    load_model: loading model '/m/a.gguf'\n"})
    ready = json.dumps({"type": "log", "msg": "srv  llama_server: model loaded\n"})
    facts = only("\n".join((start, record(24000, 150, 100), ready, record(23800, 160, 110))) + "\n")
    assert facts.estimated is False
    assert facts.devices["CUDA0"].weights_bytes == 110 * MIB + MIB // 2
    assert facts.fit is not None
    assert facts.fit.rows[0].model_bytes == 100 * MIB


def test_lines_of_memory_that_nobody_knows_are_counted_for_their_load() -> None:
    strange = "some_backend: scratch pool of 512.00 MiB\n"
    told: list[str] = []
    one, two = read_chunks([(LOAD + READY + strange * 7 + LOAD + READY + strange).encode()], told.append).loads
    assert (one.unread.count, two.unread.count, len(told)) == (7, 1, 8)
    assert one.unread.samples == (strange.strip(),) * 5


def test_memory_without_a_load_says_what_the_log_looks_like() -> None:
    found = reading("srv  log: flash_attn = 1\n> some_backend: scratch pool of 512.00 MiB\n")
    assert (found.loads, found.unread.count) == ([], 1)
    message, hint = unreadable(found)
    assert "llama-server" in message
    assert "--log-verbosity 4" in hint


def test_two_runs_in_one_paste_are_two_loads() -> None:
    longer = LOAD.replace("8192", "16384").replace("1024.00", "2048.00").replace("512.00", "1024.00")
    first, second = parse_log(LOAD + "and with 16k:\n" + longer)
    assert (first.total("kv_cache_bytes"), second.total("kv_cache_bytes")) == (1024 * MIB, 2048 * MIB)


def test_two_models_of_one_router_that_load_at_the_same_moment_stay_apart() -> None:
    def lines(pid: int, model: str, text: str) -> list[str]:
        own = [f"srv    load_model: loading model '{model}'", *text.splitlines(), READY.strip()]
        return [f"[{pid}] 0.00.012.{number:03d} I {line}\n" for number, line in enumerate(own)]

    both = zip(lines(1111, "/m/a", LOAD), lines(2222, "/m/b", LOAD.replace("4437.80", "8000.00")), strict=True)
    first, second = parse_log("".join(line for pair in both for line in pair))
    assert (first.model, first.devices["CUDA0"].weights_bytes) == ("/m/a", round(4437.8 * MIB))
    assert (second.model, second.devices["CUDA0"].weights_bytes) == ("/m/b", 8000 * MIB)
    assert first.complete
    assert second.complete


@pytest.mark.parametrize(
    ("text", "mib"),
    [("4437.80", 4437.8), ("4437,80", 4437.8), ("4,437.80", 4437.8), ("4.437,80", 4437.8), ("4,437", 4437.0), ("12,5", 12.5)],
)
def test_sizes_are_read_in_every_locale(text: str, mib: float) -> None:
    facts = only(f"load_tensors:        CUDA0 model buffer size = {text} MiB\n")
    assert facts.devices["CUDA0"].weights_bytes == round(mib * MIB)


def test_a_number_at_the_end_of_a_cut_log_is_unknown() -> None:
    assert only(LOAD + "llama_context: n_ubatch      = 51").num_batch is None
    assert only(LOAD + "llama_context: n_ubatch      = 512\n").num_batch == 512


def test_experts_on_the_host_by_choice_are_no_full_offload() -> None:
    tensor = "tensor blk.{}.ffn_up_exps.weight (256 MiB q4_K) buffer type overridden to {}\n"
    facts = only(tensor.format(0, "CPU") + tensor.format(1, "CPU") + tensor.format(2, "CUDA1") + LOAD + READY)
    assert (facts.overridden_tensors, facts.fully_offloaded) == (2, False)
    splits = "sched_reserve: graph: nodes = 3000, splits = 66, input objects = 4\n"
    unsaid = only(LOAD.replace("281.81", "48210.50") + splits + READY)
    assert (unsaid.overridden_tensors, unsaid.fully_offloaded) == (None, False)


def test_what_could_be_left_out_is_summed() -> None:
    projector = (
        "clip_ctx: CLIP using CUDA0 backend\nload_hparams: model size:   802.50 MiB\n"
        "reserve_compute_meta:      CUDA0 compute buffer size =    64.00 MiB\n"
    )
    draft = (
        "srv    load_model: creating MTP draft context against the target model '/m/a'\n"
        "llama_kv_cache:      CUDA0 KV buffer size =    32.00 MiB\n"
        "sched_reserve:      CUDA0 compute buffer size =    16.00 MiB\n"
    )
    facts = only(LOAD + projector + draft + READY)
    assert facts.optional_bytes == {"projector": round(866.5 * MIB), "draft": 48 * MIB}


def test_pipeline_parallelism_is_told_by_its_copies() -> None:
    assert only(LOAD + "sched_reserve: reserve took 3.36 ms, sched copies = 4\n" + READY).sched_copies == 4
    assert only(LOAD + "llama_context: pipeline parallelism enabled (n_copies=4)\n" + READY).sched_copies == 4
    again = "llama_context: pipeline parallelism enabled\ngraph_reserve: retrying without pipeline parallelism\n"
    assert only(LOAD + again + READY).sched_copies == 1
    assert only(LOAD + READY).sched_copies is None
