"""Constants from starts of vLLM: budgets and footprints of each release, blocks made exact, hybrids, what cannot be trusted."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest

from harness.engines.vllm.allocation import allocate
from harness.engines.vllm.fit import fit_vllm as fit_record
from harness.engines.vllm.safetensors import tensor_bytes
from harness.errors import UntrustedError
from harness.logs import parse_log
from harness.maintain.refit import refit
from harness.model.record import EngineVersion, Gpu, Load, LoadRequest, Machine, Model, Record, Reported, Settings, VllmSettings
from harness.model.trace import Plateau
from harness.prediction.memory import predict
from harness.store.yaml import read_calibration
from harness.units import GIB, MIB, gib
from tests.support.rules import judge, largest_context
from tests.support.vllm_artifacts import vllm_calibration


def log(version: str, *lines: str, tp: int = 1, context: int = 8192) -> str:
    config = (
        f"(EngineCore pid=7) INFO 10-06 17:00:05 [core.py:121] Initializing a V1 LLM engine (v{version}) with config: "
        f"model='acme/Tern-8B', dtype=torch.bfloat16, max_seq_len={context}, tensor_parallel_size={tp}, kv_cache_dtype=auto\n"
    )
    body = "".join(f"{line}\n" for line in lines)
    return config + body + "(APIServer pid=1) INFO:     Application startup complete.\n"


def worker(text: str, rank: int = 0) -> str:
    return f"(Worker_TP{rank} pid={20 + rank}) INFO 10-06 17:00:11 [gpu_worker.py:407] {text}"


def size(tokens: int, times: float, context: int) -> str:
    return (
        f"(EngineCore pid=7) INFO 10-06 17:00:33 [kv_cache_utils.py:1] GPU KV cache size: {tokens:,} tokens, "
        f"Maximum concurrency for {context:,} tokens per request: {times:.2f}x"
    )


def load(text: str, *, kv: int | None = None, reported: Reported | None = None, meter: int | None = None) -> Load:
    facts = parse_log(text)[-1]
    return Load(
        request=LoadRequest(context=(facts.vllm and facts.vllm.max_model_len) or 0, kv_cache_bytes=kv),
        outcome="ok",
        facts=facts,
        reported=reported,
        busy=None if meter is None else Plateau(total_bytes=meter),
    )


def record(*loads: Load, gpus: int = 1) -> Record:
    return Record(
        run="r",
        harness_version="0",
        started_at="2026-11-01T00:00:00Z",
        id="vllm/acme--tern-8b",
        engine_name="vllm",
        model=Model(name="acme/Tern-8B", train_context=131072),
        engine=EngineVersion(),
        settings=Settings(kv_cache_type="auto", vllm=VllmSettings(model="acme/Tern-8B", max_num_seqs=8)),
        machine=Machine(
            target="gpu", sandbox="docker", meter="nvml", gpus=tuple(Gpu(name="Acme T1", memory_gb=24.0) for _ in range(gpus))
        ),
        loads=loads,
    )


def summary(total: float, share: float, asked: float, parts: str) -> str:
    return (
        f"Free memory on device ({total - 0.4:.2f}/{total} GiB) on startup. Desired GPU memory utilization is ({share}, "
        f"{asked} GiB). Actual usage is {parts}."
    )


NEW = log(
    "0.27.1",
    worker("Model loading took 15.0 GiB memory and 5.42 seconds"),
    worker("Estimated CUDA graph memory: 0.50 GiB total"),
    worker("Available KV cache memory: 4.0 GiB"),
    size(32768, 4.0, 8192),
    worker("Graph capturing finished in 6 secs, took 0.30 GiB"),
    worker(
        summary(
            23.5,
            0.9,
            21.15,
            "15.4 GiB for consumed memory (weights + non-torch), 1.75 GiB for peak activation, and 0.3 GiB for CUDAGraph "
            "memory",
        )
    ),
)  # fmt: skip
EXACT = log(
    "0.27.1",
    worker("Model loading took 15.0 GiB memory and 5.42 seconds"),
    worker("Initial free memory 23.1 GiB, reserved 0.26 GiB memory for KV Cache as specified by kv_cache_memory_bytes config"),
    size(2112, 1.03, 2048),
    context=2048,
)


def two_starts() -> Record:
    block = 2 * MIB
    return record(
        load(NEW, reported=Reported(block_size=16, num_blocks=2048, max_concurrency=4.0, context=8192, version="0.27.1")),
        load(
            EXACT,
            kv=132 * block + 1000,
            reported=Reported(block_size=16, num_blocks=132, max_concurrency=1.03125, context=2048),
        ),
    )


def test_since_0_20_the_budget_holds_an_estimate_of_the_graphs_and_the_footprint_what_they_take() -> None:
    calibration = fit_record(two_starts())
    metadata = calibration.metadata
    assert metadata.breakdown_gb.budget == pytest.approx(21.15 - 4.0, abs=1e-6)
    assert calibration.constants.base_vram_gb == pytest.approx(21.15 - 4.0 - 0.5 + 0.3, abs=1e-6)
    assert metadata.breakdown_gb.weights == 15.0
    parts = metadata.breakdown_gb
    assert (parts.weights or 0) + (parts.fixed_cache or 0) + (parts.compute or 0) + (parts.overhead or 0) == pytest.approx(
        calibration.constants.base_vram_gb
    )
    assert metadata.machine.total_cuda_gb == 23.5
    assert metadata.quality.max_error == 0.0


def test_before_0_20_graphs_lie_on_top_of_the_budget() -> None:
    old = NEW.replace("0.27.1", "0.19.0")
    calibration = fit_record(
        record(load(old, reported=Reported(block_size=16, num_blocks=2048, max_concurrency=4.0, context=8192)))
    )
    assert calibration.constants.base_vram_gb == pytest.approx(21.15 - 4.0 + 0.3, abs=1e-6)


def test_the_cost_of_a_block_is_exact_although_the_log_is_rounded() -> None:
    calibration = fit_record(two_starts())
    blocks = calibration.metadata.kv_blocks
    assert blocks is not None
    assert (blocks.size, blocks.bytes, blocks.per_block, blocks.fixed) == (16, 2 * MIB, 1, 0)
    assert calibration.constants.kv_cache_gb_per_10k == gib(2 * MIB / 16 * 10_000)


def test_a_hybrid_model_needs_two_lengths() -> None:
    # 544 tokens a block, four groups of layers and three blocks of state for each sequence.
    def start(context: int, need: int) -> Load:
        text = NEW.replace("8,192", f"{context:,}").replace("max_seq_len=8192", f"max_seq_len={context}")
        return load(text, reported=Reported(block_size=544, num_blocks=2048, max_concurrency=2048 / need, context=context))

    long, short = start(54400, 403), start(5440, 43)
    blocks = fit_record(record(long, short)).metadata.kv_blocks
    assert blocks is not None
    assert (blocks.per_block, blocks.fixed) == (4, 3)
    with pytest.raises(UntrustedError, match="two different lengths"):
        fit_record(record(long))


def test_of_several_gpus_the_fullest_counts_and_figures_are_those_of_one() -> None:
    two = log(
        "0.10.2",
        *(worker(f"Model loading took {7.5 + rank / 10} GiB and 5.42 seconds", rank) for rank in (0, 1)),
        *(worker(f"Available KV cache memory: {12.0 - rank / 10} GiB", rank) for rank in (0, 1)),
        size(97472, 11.90, 8192),
        *(worker("Graph capturing finished in 6 secs, took 0.30 GiB", rank) for rank in (0, 1)),
        *(
            worker(
                summary(
                    23.5,
                    0.9,
                    21.15,
                    f"{7.5 + rank / 10} GiB for weight, 1.4 GiB for peak activation, 0.2 GiB for non-torch memory, and 0.3 "
                    "GiB for CUDAGraph memory",
                ),
                rank,
            )
            for rank in (0, 1)
        ),
        tp=2,
    )  # fmt: skip
    calibration = fit_record(record(load(two, reported=Reported(block_size=16, num_blocks=6092, context=8192)), gpus=2))
    assert calibration.constants.base_vram_gb == pytest.approx(21.15 - 11.9 + 0.3, abs=1e-6)
    assert calibration.metadata.settings.vllm is not None
    assert calibration.metadata.settings.vllm.tensor_parallel == 2
    assert calibration.metadata.kv_blocks is not None
    assert calibration.metadata.kv_blocks.bytes == 2 * MIB


def test_starts_that_contradict_each_other_are_not_to_be_trusted() -> None:
    good = two_starts()
    wrong = msgspec.structs.replace(
        good.loads[1], reported=Reported(block_size=16, num_blocks=66, context=2048, max_concurrency=0.515625)
    )
    with pytest.raises(UntrustedError, match="contradict"):
        fit_record(msgspec.structs.replace(good, loads=(good.loads[0], wrong)))


def test_a_run_without_a_start_by_share_is_not_fitted() -> None:
    with pytest.raises(UntrustedError, match="nothing to fit"):
        fit_record(msgspec.structs.replace(two_starts(), loads=(two_starts().loads[1],)))


def test_what_the_driver_counts_beside_the_log_is_noted() -> None:
    good = two_starts()
    seen = msgspec.structs.replace(good.loads[0], busy=Plateau(total_bytes=round(22.5 * GIB)))
    notes = fit_record(msgspec.structs.replace(good, loads=(seen, good.loads[1]))).metadata.quality.notes
    assert any("the driver counts 18.50 GiB beside the KV cache" in note for note in notes)


def test_predictions_round_to_blocks_of_the_engine() -> None:
    calibration = vllm_calibration()
    assert predict(calibration, 17).context_cache_bytes == pytest.approx(4 * MIB, abs=MIB / 10)
    assert predict(calibration, 17, 3).context_cache_bytes == pytest.approx(12 * MIB, abs=MIB / 10)


def test_check_says_that_vllm_would_not_start() -> None:
    calibration = vllm_calibration()
    fits = judge(calibration, 8192, 1, (40 * GIB,))
    assert (fits.verdict, fits.short_bytes, fits.reason) == ("fits", 0, None)
    assert fits.required_bytes is not None
    assert fits.reserve_bytes is not None
    assert fits.required_bytes + fits.reserve_bytes <= 40 * GIB
    short = judge(calibration, 131072, 1, (30 * GIB,))
    assert (short.verdict, short.max_context) == ("offload", largest_context(calibration, 1, (30 * GIB,)))
    assert short.reason is not None
    assert "does not start" in short.reason
    assert judge(calibration, 8192, 65, (40 * GIB,)).verdict == "unknown"
    assert judge(calibration, 8192, 1, (40 * GIB, 40 * GIB)).verdict == "unknown"


def safetensors(path: Path, sizes: dict[str, int]) -> None:
    offset, entries = 0, []
    for name, length in sizes.items():
        entries.append(f'"{name}": {{"dtype": "U8", "shape": [{length}], "data_offsets": [{offset}, {offset + length}]}}')
        offset += length
    header = ("{" + ", ".join(entries) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(offset))


def test_weights_are_counted_from_the_files_tables(tmp_path: Path) -> None:
    safetensors(
        tmp_path / "a.safetensors", {"model.layers.0.mlp": 100, "model.layers.1.mlp": 120, "model.embed_tokens.weight": 7}
    )
    safetensors(tmp_path / "b.safetensors", {"model.layers.1.attn": 30, "lm_head.weight": 9})
    found = tensor_bytes(tmp_path)
    assert found is not None
    assert (found.layer_bytes, found.embedding_bytes, found.output_bytes) == ((100, 150), 7, 9)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 40) + b'{"a": {"data_offsets": [0, 99]}}']
)
def test_files_that_are_not_whole_tell_no_weights(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    assert tensor_bytes(tmp_path) is None


REAL = Path(__file__).parents[2] / "golden" / "vllm" / "0.32.0-cpu"


def test_a_real_run_on_a_cpu_gives_its_artifact_again_from_its_record() -> None:
    """Measured with the CPU build of vLLM 0.32.0: a Llama of 21 million random weights, 8192 bytes of KV cache a token."""
    written = read_calibration(REAL / "tiny-llama.yaml")
    _, again = refit(REAL)
    assert (again.constants, again.metadata.kv_blocks) == (written.constants, written.metadata.kv_blocks)
    assert again.metadata.breakdown_gb == written.metadata.breakdown_gb
    assert again.metadata.settings == written.metadata.settings
    assert again.metadata.quality == written.metadata.quality
    assert again.constants.kv_cache_gb_per_10k == gib(8192 * 10_000)  # 2 · 8 layers · 4 heads · 64 · 2 bytes


def test_the_same_real_run_allocates_what_its_engine_then_admitted() -> None:
    """With 65 blocks a context of 8192 tokens started, with 64 it did not (see the log beside the artifact)."""
    granted = allocate(read_calibration(REAL / "tiny-llama.yaml"), 8192, 1, (8 * GIB,))
    assert (granted.blocks, granted.spare_blocks, granted.kv_cache_bytes) == (65, 1, 66 * MIB)
    refused = parse_log((REAL / "one-block-less.log").read_bytes())[-1].vllm
    assert refused is not None
    assert (refused.failure_class, refused.max_model_len) == ("kv_too_small", 8192)


@pytest.mark.parametrize(("version", "counted"), [("0.19.9", 0.0), ("0.20.0", 0.5)])
def test_an_estimate_of_the_graphs_is_in_the_budget_from_0_20_0_on(version: str, counted: float) -> None:
    """A budget of 17.15 GiB, and graphs of 0.3, which were estimated at 0.5."""
    reported = Reported(block_size=16, num_blocks=2048, max_concurrency=4.0, context=8192, version=version)
    fitted = fit_record(record(load(NEW.replace("0.27.1", version), reported=reported)))
    beside = fitted.constants.base_vram_gb - (fitted.metadata.breakdown_gb.fixed_cache or 0)
    assert beside == pytest.approx(17.15 + 0.3 - counted, abs=0.02)
