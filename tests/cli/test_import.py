"""``harness import``: constants from somebody else's log and reading, marked as such, or a refusal that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from harness.cli.main import cli
from harness.store.store import Store
from harness.store.yaml import read_calibration
from harness.units import GIB, MIB

MODEL = "/root/.ollama/models/blobs/sha256-" + "ab" * 32


def log(cells: int, *, kv: float, compute: float, ready: bool = True, flash: str = "enabled") -> str:
    """A load of Ollama 0.33 on one GPU."""
    done = 'time=2026-09-02T16:53:11Z level=INFO msg="llama-server started in 9.50 seconds"\n' if ready else ""
    return (
        'time=2026-09-02T16:52:34Z level=INFO msg="starting llama-server" cmd="/usr/lib/ollama/llama-server '
        f'--model {MODEL} --port 1 -c {cells} -np 1 --flash-attn auto -b 512 -ub 512"\n'
        "print_info: n_ctx_train           = 32768\n"
        "load_tensors: offloaded 29/29 layers to GPU\n"
        "load_tensors:        CUDA0 model buffer size =  4000.00 MiB\n"
        f"llama_context: n_seq_max             = 1\nllama_context: n_ctx                 = {cells}\n"
        "llama_context: n_ubatch              = 512\n"
        f"llama_kv_cache:      CUDA0 KV buffer size = {kv:8.2f} MiB\n"
        f"llama_kv_cache: size = {kv:8.2f} MiB ({cells:6d} cells,  28 layers,  1/1 seqs), "
        f"K (f16): {kv / 2:8.2f} MiB, V (f16): {kv / 2:8.2f} MiB\n"
        f"resolve_fused_ops: Flash Attention {flash}\n"
        f"sched_reserve:      CUDA0 compute buffer size = {compute:8.2f} MiB\n" + done
    )


SMALL = log(4096, kv=224, compute=104)
MIDDLE = log(8192, kv=448, compute=108)
LARGE = log(16384, kv=896, compute=116)


def run(tmp_path: Path, text: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "server.log"
    file.write_text(text)
    result = CliRunner().invoke(cli, ["import", str(file), "--json", "--store", str(tmp_path / "store"), *arguments])
    return result.exit_code, json.loads(result.stdout)


def test_several_loads_give_lines_and_an_error_like_measured_ones(tmp_path: Path) -> None:
    totals = [f"{4000 + 300 + rest}MiB" for rest in (224 + 104, 448 + 108, 896 + 116)]
    arguments = [part for total in totals for part in ("--total", total)]
    code, answer = run(tmp_path, SMALL + MIDDLE + LARGE, *arguments, "--model", "qwen2:7b", "--gpu", "NVIDIA X")
    assert code == 0, answer
    calibration = Store(tmp_path / "store").read(Path(answer["data"]["artifact"]))
    metadata = calibration.metadata
    assert calibration.id == "ollama/qwen2-7b"
    assert (metadata.machine.meter, metadata.machine.sandbox, metadata.machine.target) == ("import", "unknown", "gpu")
    assert metadata.model.digest == "sha256:" + "ab" * 32
    assert metadata.breakdown_gb.overhead == pytest.approx(300 * MIB / GIB, abs=1e-5)
    assert calibration.constants.kv_cache_gb_per_10k == pytest.approx(56 * 1024 * 10_000 / GIB, rel=1e-4)
    assert metadata.quality.max_error == pytest.approx(0, abs=1e-4)
    assert metadata.quality.valid_to == 32768
    assert any("measured by others" in note for note in metadata.quality.notes)
    assert Path(answer["data"]["record"]).is_file()


def test_one_load_gives_constants_that_end_where_it_stands(tmp_path: Path) -> None:
    code, answer = run(tmp_path, MIDDLE, "--total", "4.74GiB", "--model", "qwen2:7b")
    assert code == 0, answer
    quality = answer["data"]["calibration"]["metadata"]["quality"]
    assert (quality["valid_to"], quality["max_error"]) == (8192, None)
    assert any("one load" in note for note in quality["notes"])
    assert answer["data"]["calibration"]["constants"]["compute_gb_per_10k"] == pytest.approx(1024 * 10_000 / GIB, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "arguments", "code", "error"),
    [
        ("nothing\n", ["--total", "5g"], 65, "no-load"),
        (log(8192, kv=448, compute=108, ready=False), ["--total", "5g"], 65, "no-load"),
        (MIDDLE, ["--total", "4g"], 65, "total-too-small"),
        (MIDDLE, ["--total", "five"], 2, "usage"),
        (MIDDLE, ["--total", "5g", "--total", "6g"], 2, "count-differs"),
        (MIDDLE, ["--total", "5g", "--load", "2"], 2, "no-such-load"),
        (MIDDLE, ["--total", "5g", "--ctx", "4096"], 65, "context-differs"),
        (MIDDLE.replace("29/29", "20/29"), ["--total", "5g"], 5, "not-a-point"),
        (MIDDLE.replace("CUDA0 KV", "  CPU KV"), ["--total", "5g"], 5, "not-a-point"),
        (log(8192, kv=448, compute=108, flash="disabled"), ["--total", "5g"], 5, "too-few-points"),
        (MIDDLE + MIDDLE.replace("ab" * 32, "cd" * 32), ["--total", "5g,5g"], 65, "other-model"),
        (SMALL + MIDDLE + LARGE, ["--total", "4.6g,4.7g,5.6g"], 5, "overhead-moves"),
    ],
)
def test_what_no_constants_can_follow_from_is_refused(
    tmp_path: Path, text: str, arguments: list[str], code: int, error: str
) -> None:
    got, answer = run(tmp_path, text, "--model", "qwen2:7b", *arguments)
    assert (got, answer["errors"][0]["code"]) == (code, error)
    assert not list((tmp_path / "store").rglob("*.yaml"))


def test_a_log_that_names_only_a_blob_needs_a_name(tmp_path: Path) -> None:
    code, answer = run(tmp_path, MIDDLE, "--total", "5g")
    assert (code, answer["errors"][0]["code"]) == (2, "no-name")


def test_a_measured_calibration_of_another_gpu_is_not_overwritten(tmp_path: Path) -> None:
    assert run(tmp_path, MIDDLE, "--total", "5g", "--model", "m", "--gpu", "NVIDIA X")[0] == 0
    code, answer = run(tmp_path, MIDDLE, "--total", "5g", "--model", "m", "--gpu", "NVIDIA Y")
    assert (code, answer["errors"][0]["code"]) == (73, "would-overwrite")
    assert run(tmp_path, MIDDLE, "--total", "5g", "--model", "m", "--gpu", "NVIDIA Y", "--variant", "y")[0] == 0


def test_more_slots_than_cells_is_no_load(tmp_path: Path) -> None:
    text = MIDDLE.replace("n_seq_max             = 1\n", "n_seq_max             = 111111\n")
    assert text != MIDDLE
    code, answer = run(tmp_path, text, "--total", "5g", "--model", "m")
    assert (code, answer["errors"][0]["code"]) == (65, "facts-missing")


def imported(tmp_path: Path, text: str, *arguments: str) -> Any:
    code, answer = run(tmp_path, text, *arguments, "--model", "made-up", "--gpu", "NVIDIA X")
    assert code == 0, answer
    return Store(tmp_path / "store").read(Path(answer["data"]["artifact"]))


def refused(tmp_path: Path, text: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, answer = run(tmp_path, text, *arguments, "--model", "made-up")
    return code, answer["errors"][0]


@pytest.mark.parametrize(("beyond", "plausible"), [(17 * 1024, False), (100, False), (300, True), (727, True)])
def test_what_no_driver_takes_is_refused_and_kept_by_force_with_a_note(tmp_path: Path, beyond: int, plausible: bool) -> None:
    total = ("--total", f"{4000 + 224 + 104 + beyond}MiB")
    if plausible:
        assert imported(tmp_path, SMALL, *total).metadata.breakdown_gb.overhead == pytest.approx(beyond / 1024, abs=1e-3)
        return
    code, error = refused(tmp_path, SMALL, *total)
    assert (code, error["code"]) == (5, "implausible-overhead")
    kept = imported(tmp_path, SMALL, *total, "--force")
    assert any("kept by --force" in note for note in kept.metadata.quality.notes)


def test_the_reserve_is_the_one_that_the_log_says(tmp_path: Path) -> None:
    """A projector: llama.cpp's fit is asked to leave 2 174 MiB, not 1 024."""
    said = "common_params_fit_impl: projected to use 4328 MiB of device memory vs. 9482 MiB of free device memory\n"
    said += "common_params_fit_impl: will leave 5154 >= 2174 MiB of free device memory, no changes needed\n"
    made = imported(tmp_path, SMALL.replace("load_tensors: offloaded", said + "load_tensors: offloaded"), "--total", "4628MiB")
    assert made.metadata.placement.reserve_gb == pytest.approx(2174 / 1024, abs=1e-5)


def test_a_cache_whose_type_no_line_names_is_unknown(tmp_path: Path) -> None:
    silent = "".join(line for line in SMALL.splitlines(keepends=True) if not line.startswith("llama_kv_cache: size"))
    code, answer = run(
        tmp_path, silent, "--total", "4628MiB", "--model", "made-up", "--gpu", "NVIDIA X", "--ctx", "4096"
    )  # fmt: skip
    assert code == 0, answer
    assert answer["data"]["calibration"]["metadata"]["settings"]["kv_cache_type"] == "unknown"
    asked = CliRunner().invoke(
        cli, ["check", "made-up@4096", "--available", "24GiB", "--kv-cache-type", "f16", "--store", str(tmp_path / "store")]
    )  # fmt: skip
    assert asked.exit_code == 4


def test_compute_below_nothing_is_refused_with_its_reason(tmp_path: Path) -> None:
    """One load, whose compute is less than its batch alone would make it grow by."""
    code, error = refused(tmp_path, log(16384, kv=896, compute=10), "--total", f"{4000 + 896 + 10 + 300}MiB")
    assert (code, error["code"]) == (5, "negative-compute")


def test_a_total_in_whole_mebibytes_is_a_total(tmp_path: Path) -> None:
    """Rounded down it is a little less than the log: on the host, where nothing comes on top."""
    host = log(4096, kv=224, compute=104.4).replace("CUDA0", "CPU").replace("offloaded 29/29", "offloaded 0/29")
    code, answer = run(tmp_path, host, "--total", "4328", "--model", "made-up")
    assert code == 0, answer
    code, error = refused(tmp_path, host, "--total", "4320")
    assert (code, error["code"]) == (65, "total-too-small")
    assert "a bare number is MiB" in error["hint"]


def test_several_logs_of_one_model_are_its_points(tmp_path: Path) -> None:
    files = []
    for index, text in enumerate((SMALL, MIDDLE, LARGE)):
        files.append(tmp_path / f"{index}.log")
        files[-1].write_text(text)
    totals = [f"{4000 + 300 + rest}MiB" for rest in (224 + 104, 448 + 108, 896 + 116)]
    result = CliRunner().invoke(
        cli,
        [
            *("import", *map(str, files), "--total", ",".join(totals), "--model", "made-up", "--json"),
            *("--store", str(tmp_path / "store")),
        ],
    )
    assert result.exit_code == 0, result.output
    quality = json.loads(result.stdout)["data"]["calibration"]["metadata"]["quality"]
    assert [one["context"] for one in quality["loads"]] == [4096, 8192, 16384]
    assert quality["max_error"] is not None
    assert any("with --gpu NAME" in note for note in quality["notes"])
    assert not any("to be better it needs" in note for note in quality["notes"])


VLLM = Path(__file__).parents[1] / "golden" / "vllm"


def of_vllm(tmp_path: Path, logs: list[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    files = [str(VLLM / f"{log}.log") for log in logs]
    result = CliRunner().invoke(cli, ["import", *files, "--json", "--store", str(tmp_path / "store"), *arguments])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("logs", [["0.32.0-cpu/engine-0"], ["0.32.0-cpu/engine-0", "0.32.0-cpu/engine-1"]])
def test_logs_of_vllm_give_the_blocks_and_the_base_that_were_measured(tmp_path: Path, logs: list[str]) -> None:
    """With what the meter said of each start, which on host memory the log does not know."""
    measured = read_calibration(VLLM / "0.32.0-cpu" / "tiny-llama.yaml")
    totals = [one for total in (7140913152, 1795768320)[: len(logs)] for one in ("--total", f"{total / MIB}MiB")]
    code, answer = of_vllm(tmp_path, logs, *totals)
    assert code == 0, answer
    made = Store(tmp_path / "store").read(Path(answer["data"]["artifact"]))
    assert made.metadata.kv_blocks == measured.metadata.kv_blocks
    assert made.constants.kv_cache_gb_per_10k == measured.constants.kv_cache_gb_per_10k
    assert made.constants.base_vram_gb == pytest.approx(measured.constants.base_vram_gb, abs=0.0015)
    assert (made.metadata.machine.meter, made.metadata.machine.target) == ("import", "host")
    assert made.metadata.settings.vllm is not None
    assert made.metadata.settings.vllm.max_num_seqs == 8
    assert made.metadata.quality.valid_to == 16384


@pytest.mark.parametrize(
    ("log", "tokens", "beside", "gpus"), [("0.6.4/v0", 28752, 16.21 + 0.38 + 0.27, 1), ("0.6.6/v0-tp2", 197088, 9.25 + 0.24, 2)]
)
def test_a_log_of_vllm_alone_gives_what_a_gpu_takes(tmp_path: Path, log: str, tokens: int, beside: float, gpus: int) -> None:
    """Blocks as the log counts them; weights, activation, the rest and graphs as it prints them."""
    code, answer = of_vllm(tmp_path, [log])
    assert code == 0, answer
    made = Store(tmp_path / "store").read(Path(answer["data"]["artifact"]))
    blocks, facts = made.metadata.kv_blocks, json.loads((VLLM / f"{log}.json").read_text())["loads"][0]
    assert blocks is not None
    assert (blocks.size, facts["kv_tokens"], made.id) == (16, tokens, "vllm/acme--Tern-8B")
    assert blocks.bytes * tokens / 16 == pytest.approx(min(one["kv_available_bytes"] for one in facts["workers"]), rel=1e-3)
    assert made.constants.base_vram_gb == pytest.approx(beside, abs=0.011)
    assert made.metadata.settings.vllm is not None
    assert (made.metadata.settings.vllm.max_num_seqs, made.metadata.settings.vllm.tensor_parallel) == (1, gpus)
    notes = made.metadata.quality.notes
    assert any("nothing was measured beside it" in note for note in notes)
    assert any("it answers for one" in note for note in notes)


@pytest.mark.parametrize(
    ("log", "code", "error", "says"),
    [
        ("0.32.0-cpu/engine-0", 5, "log-lacks-figures", "on host memory"),
        ("0.11.2/v1-tp2-rank-0-speaks", 5, "log-lacks-figures", "what was requested"),
        ("0.7.3/v1-early", 5, "log-lacks-figures", "what was available"),
        ("0.29.0/v1-explicit-bytes-then-free-too-low", 5, "log-lacks-figures", "given in bytes"),
        ("0.7.3/v0-seq-too-long", 65, "no-load", "no load that became ready"),
    ],
)
def test_a_log_of_vllm_that_lacks_figures_is_refused_with_what_it_would_need(
    tmp_path: Path, log: str, code: int, error: str, says: str
) -> None:
    got, answer = of_vllm(tmp_path, [log])
    assert (got, answer["errors"][0]["code"]) == (code, error)
    assert says in answer["errors"][0]["message"]
    assert not list((tmp_path / "store").rglob("*.yaml"))


def test_a_start_of_vllm_by_bytes_alone_and_a_total_below_its_cache_are_refused(tmp_path: Path) -> None:
    code, answer = of_vllm(tmp_path, ["0.32.0-cpu/engine-1"], "--total", "1712MiB")
    assert (code, answer["errors"][0]["code"]) == (5, "no-points")
    code, answer = of_vllm(tmp_path, ["0.32.0-cpu/engine-0"], "--total", "1712MiB")
    assert (code, answer["errors"][0]["code"]) == (65, "total-too-small")


def test_the_parts_of_a_load_need_a_total(tmp_path: Path) -> None:
    code, answer = run(tmp_path, MIDDLE, "--model", "qwen2:7b")
    assert (code, answer["errors"][0]["code"]) == (2, "no-total")


@pytest.mark.parametrize("context", [256, 4096, 8192])
def test_where_the_one_load_fitted_shorter_contexts_fit(tmp_path: Path, context: int) -> None:
    """A bound that only grows with the distance from the load said CPU OFFLOAD LIKELY at half its context."""
    assert run(tmp_path, MIDDLE, "--total", "4856MiB", "--model", "m")[0] == 0
    arguments = ["check", "m", "--ctx", str(context), "--num-batch", "512", "--store", str(tmp_path / "store")]
    for available, code in (("7GiB", 0), ("4700MiB", 3)):
        result = CliRunner().invoke(cli, [*arguments, "--available", available])
        assert result.exit_code == code, result.output


@pytest.mark.parametrize("said", ["splits", "tensors", "nothing"])
def test_weights_on_the_host_by_choice_need_host_memory(tmp_path: Path, said: str) -> None:
    """``-ot exps=CPU``, ``--n-cpu-moe``: N of N layers are on the GPU, and 20 GiB of their experts are not.

    The host was asked for nothing where the log showed that they had been put there.
    """
    text = MIDDLE.replace(
        "load_tensors:        CUDA0", "load_tensors:   CPU_Mapped model buffer size = 20480.00 MiB\nload_tensors: CUDA0"
    )
    if said == "tensors":
        text = f"tensor blk.0.ffn_up_exps.weight (256 MiB q4_K) buffer type overridden to CPU\n{text}"
    if said == "splits":
        text = text.replace("sched_reserve:      CUDA0", "sched_reserve: graph splits = 58\nsched_reserve:      CUDA0")
    assert run(tmp_path, text, "--total", "4856MiB", "--model", "m")[0] == 0
    arguments = ["check", "m@8192", "--num-batch", "512", "--store", str(tmp_path / "store"), "--available", "8GiB"]
    for host, code, sentence in (
        ("19GiB", 3, "Host memory: needs 20,480 MiB, 19,456 MiB are available: short by 1,024 MiB"),
        ("32GiB", 0, "Host memory: 20.0 GiB of 32.0 GiB available."),
        (None, 0, "Host memory: 20.0 GiB, not judged (--host-available SIZE judges it)."),
    ):
        result = CliRunner().invoke(cli, [*arguments, *(("--host-available", host) if host else ())])
        assert (result.exit_code, sentence in result.output) == (code, True), result.output


def test_a_model_on_the_host_whose_compute_buffers_are_on_a_gpu_is_no_point(tmp_path: Path) -> None:
    """``-ngl 0`` with a GPU: neither the memory of the processes nor that of the card is all of it."""
    text = SMALL.replace("29/29", "0/29").replace("CUDA0 model", "  CPU model").replace("CUDA0 KV", "  CPU KV")
    code, error = refused(tmp_path, text, "--total", "4450MiB")
    assert (code, error["code"]) == (5, "not-a-point")
    assert "compute buffers are on CUDA0" in error["message"]


def test_a_whole_load_whose_log_has_no_ready_line_is_imported_by_its_number(tmp_path: Path) -> None:
    """LM Studio and others wrap llama.cpp and print no line of llama-server's; who read the memory saw it loaded."""
    text = log(8192, kv=448, compute=108, ready=False)
    code, answer = run(tmp_path, text, "--total", "4856MiB", "--model", "m")
    assert (code, answer["errors"][0]["code"]) == (65, "no-load")
    assert "--load N" in answer["errors"][0]["hint"]
    made = imported(tmp_path, text, "--total", "4856MiB", "--load", "1")
    assert any("no line that says that the engine was ready" in note for note in made.metadata.quality.notes)
    cut = text.partition("sched_reserve")[0]
    code, error = refused(tmp_path, cut, "--total", "4856MiB", "--load", "1")
    assert (code, error["code"]) == (65, "no-load")


@pytest.mark.parametrize(
    ("line", "other", "says"),
    [
        (b"0.6.4.post1", b"0.6.5", "version: 0.6.4.post1, 0.6.5"),
        (b"tensor_parallel_size=1", b"tensor_parallel_size=2", "tensor parallel: 1, 2"),
        (b"dtype=torch.bfloat16", b"dtype=torch.float16", "dtype: bfloat16, float16"),
    ],
)
def test_logs_of_vllm_that_ran_otherwise_are_no_points_of_one_line(
    tmp_path: Path, line: bytes, other: bytes, says: str
) -> None:
    log = (VLLM / "0.6.4" / "v0.log").read_bytes()
    assert line in log
    (tmp_path / "a.log").write_bytes(log)
    (tmp_path / "b.log").write_bytes(log.replace(line, other))
    code, answer = of_vllm(tmp_path, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (code, answer["errors"][0]["code"]) == (5, "settings-differ")
    assert says in answer["errors"][0]["message"]


def test_every_gpu_of_the_log_has_one_name(tmp_path: Path) -> None:
    code, error = refused(tmp_path, SMALL, "--total", "4628MiB", "--gpu", "NVIDIA X", "--gpu", "NVIDIA Y")
    assert (code, error["code"]) == (2, "count-differs")
    assert "1 GPU" in error["message"]


@pytest.mark.parametrize(
    ("given", "asked", "code"),
    [
        ("hf.co/USER/made-up-GGUF:Q4_K_M", "hf.co/USER/made-up-GGUF:Q4_K_M", 0),
        ("made-up", "made-up:latest", 0),
        ("made-up:latest", "made-up", 0),
        ("made-up:1b", "made-up:1b:latest", 4),
        ("made-up:1b", "made-up:latest", 4),
    ],
)
def test_a_name_of_ollama_finds_its_calibration(tmp_path: Path, given: str, asked: str, code: int) -> None:
    """``ollama list`` prints ``latest``; a model of the Hub is called by its address, and was taken for one."""
    assert run(tmp_path, MIDDLE, "--total", "4856MiB", "--model", given)[0] == 0
    for verb in (["check", "--available", "7GiB"], ["predict"]):
        arguments = [*verb, asked, "--ctx", "8192", "--store", str(tmp_path / "store")]
        assert CliRunner().invoke(cli, arguments).exit_code in ((0,) if code == 0 else (4, 66)), verb
