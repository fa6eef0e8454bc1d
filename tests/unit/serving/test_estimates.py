"""What is said of a model that was not calibrated: an estimate, labelled, with a bound that decides."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.cli.check import STATUS
from harness.engines.base import Options
from harness.engines.gguf import read_header
from harness.engines.shape import shape_of
from harness.errors import UntrustedError
from harness.headers import planning
from harness.inventory.machine import LocalMachine
from harness.logs.planned import read_plan, refusal
from harness.model.gpu import LocalGpu
from harness.model.planned import PlannedLoad, Shape
from harness.model.record import LoadRequest
from harness.prediction.formula import plan_by_formula
from harness.render.verdict import sentence
from harness.serving import estimates
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
from harness.serving.check import Assessment, check
from harness.store.store import Store
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, store_of
from tests.support.gguf_file import write_gguf

SHAPE = {
    "llama.embedding_length": 512,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 1024,
}
SSM = {"llama.ssm.inner_size": 1024, "llama.ssm.state_size": 16, "llama.ssm.conv_kernel": 4}
#: What llama.cpp b11549 prints of a load without memory, its lines of other things left out.
LOG = """I llama_context: flash_attn            = auto
I llama_context:        CPU  output buffer size =     1.00 MiB
I llama_kv_cache_iswa: creating non-SWA KV cache, size = 8192 cells
I llama_kv_cache:        CPU KV buffer size =     0.00 MiB
I llama_kv_cache: size =   24.00 MiB (  8192 cells,   3 layers,  1/1 seqs), K (f16):   12.00 MiB, V (f16):   12.00 MiB
I llama_kv_cache_iswa: creating     SWA KV cache, size = 1024 cells
I llama_kv_cache: size =   15.00 MiB (  1024 cells,  15 layers,  1/1 seqs), K (f16):    7.50 MiB, V (q8_0):    7.50 MiB
I llama_memory_recurrent: size =    0.03 MiB (     1 cells,   6 layers,  1 seqs  0 rs_seq), R (f32):    0.03 MiB
I resolve_fused_ops: Flash Attention enabled
I sched_reserve:        CPU compute buffer size =    27.28 MiB
E clip_init: failed to load model '/dev/null/none'
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.Planner, "_run", lambda *_: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = [
        ("token_embd.weight", 5_000_000),
        ("output.weight", 5_000_000),
        *((f"blk.{n}.attn_q.weight", 9_000_000) for n in (0, 1)),
    ]
    return write_gguf(tmp_path / "new.gguf", train_context=32_768, tensors=tensors, extra=SHAPE)


def ask(model: Path, tmp_path: Path, available: int | None, **options: object) -> Assessment:
    question = CheckRequest(model=str(model), context=8192)
    free = None if available is None else (available,)
    (one,) = check([question], Store(tmp_path / "store"), LocalMachine(), available=free, **options).models  # type: ignore[arg-type]
    return one


def test_a_plan_is_read_to_two_decimals() -> None:
    found = read_plan(LOG)
    assert found is not None
    assert [(cache.role, cache.cells, cache.total_bytes) for cache in found.caches] == [
        ("full", 8192, 24 * MIB),
        ("window", 1024, 15 * MIB),
    ]
    assert (found.compute_bytes, found.output_bytes) == (round(27.28 * MIB), MIB)
    assert (found.recurrent_bytes, found.kv_cache_type, found.flash_attention) == (round(0.03 * MIB), "f16/q8_0", "enabled")
    assert read_plan(LOG.replace("sched_reserve", "sched")) is None, "a log that ends early says nothing"


def test_an_estimate_says_that_it_is_one(model: Path, tmp_path: Path, no_engine: None) -> None:
    one = ask(model, tmp_path, 24 * GIB)
    assert one.details is not None
    assert (one.verdict, one.details.source, one.details.basis) == ("fits", "formula", "gpu")
    assert sentence(one).startswith("FITS, ESTIMATED (formula, ± ")
    assert one.to_json()["source"] == "formula"
    assert any("--header-only" in text for text in one.warnings)
    assert any("not measured" in text for text in one.warnings)


def test_measured_only_brings_back_unknown(model: Path, tmp_path: Path, no_engine: None) -> None:
    one = ask(model, tmp_path, 24 * GIB, measured_only=True)
    assert STATUS[one.verdict] == 4
    assert sentence(one).startswith("UNCALIBRATED")


def test_the_upper_end_of_the_bound_decides(model: Path, tmp_path: Path, no_engine: None) -> None:
    needed = ask(model, tmp_path, 24 * GIB).details
    assert needed is not None
    assert needed.required_bytes is not None
    assert needed.uncertainty_bytes is not None
    reserve, at = needed.reserve_bytes or 0, needed.required_bytes
    assert ask(model, tmp_path, at + reserve + needed.uncertainty_bytes).verdict == "fits"
    below = ask(model, tmp_path, at + reserve + needed.uncertainty_bytes - 1)
    assert below.verdict == "offload"
    assert below.details is not None
    assert below.details.tight


def test_what_an_estimate_cannot_say_stays_unknown(model: Path, tmp_path: Path, no_engine: None) -> None:
    assert ask(model, tmp_path, 24 * GIB, wanted=CalibrationFilter(kv_cache_type="fp8")).verdict == "unknown"
    question = CheckRequest(model=str(model), context=8192)
    (two,) = check([question], Store(tmp_path / "store"), LocalMachine(), available=(24 * GIB, 24 * GIB)).models
    assert two.verdict == "unknown", "what each of two cards takes is not in a header"


def test_a_calibration_comes_before_an_estimate(tmp_path: Path, no_engine: None) -> None:
    store = store_of(tmp_path / "store", made_up())
    (one,) = check([CheckRequest(model="made-up", context=8192)], store, LocalMachine(), available=(24 * GIB,)).models
    assert one.details is not None
    assert one.details.source == "measured"


def test_an_engines_plan_is_asked_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    shape = shape_of(read_header(model))
    assert shape is not None

    def run(_: planning.Planner, request: LoadRequest) -> PlannedLoad:
        asked.append(request.context)
        return plan_by_formula(shape, request.context, request.num_batch or 512, 1, "f16", "enabled")

    monkeypatch.setattr(planning.Planner, "_run", run)
    one = ask(model, tmp_path, 24 * GIB)
    assert one.details is not None
    assert one.details.source == "estimated"
    assert len(asked) == len(set(asked)) > 1
    asked.clear()
    again = ask(model, tmp_path, 24 * GIB)
    assert again.details == one.details
    assert asked == []


def test_on_a_gpu_the_input_of_an_untied_model_stays_on_the_host(model: Path, tmp_path: Path, no_engine: None) -> None:
    with estimates.opened(str(model)) as here:
        question, wanted, store = CheckRequest(model=str(model), context=8192), CalibrationFilter(), Store(tmp_path / "store")
        weights = {}
        for target in ("gpu", "host"):
            place = estimates.Place(target=target, available=(24 * GIB,))
            found = estimates.estimate_of(here, question, store, place, wanted)
            assert found is not None
            weights[target] = found.calibration.metadata.breakdown_gb.weights
    assert weights["host"] is not None
    assert weights["gpu"] is not None
    assert (weights["host"] - weights["gpu"]) * GIB == pytest.approx(20_000_000, abs=2000)


def test_the_drivers_part_is_that_of_the_same_device(model: Path, tmp_path: Path, no_engine: None) -> None:
    store = store_of(tmp_path / "store", made_up())
    measured = made_up().metadata.breakdown_gb.overhead
    assert measured is not None
    name = made_up().metadata.machine.gpus[0].name
    gpu = msgspec.convert({"key": "0", "name": name, "free_bytes": 24 * GIB}, LocalGpu)
    here = estimates.overhead_of(made_up().engine, estimates.Place(target="gpu", available=(1,), gpus=(gpu,)), store)
    assert (here.size, here.origin) == (round(measured * GIB), f"that of other calibrations of {name}")
    other = estimates.overhead_of(made_up().engine, estimates.Place(target="gpu", available=(1,)), store)
    assert "default" in other.origin


KNOWN = Shape(
    architecture="llama", train_context=131_072, layers=4, width=1024, heads=16, kv_heads=(4, 0, 4, 4), key_length=64,
    value_length=64, feed=4096, vocabulary=32_000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kv"),
    [
        ({}, 3 * 4 * 128 * 2 * 8192),
        ({"value_length": 0}, 3 * 4 * 64 * 2 * 8192),  # latent attention keeps keys alone
        ({"window": 512, "windowed": (True, True, True, False)}, 4 * 128 * 2 * (8192 + 2 * 1024)),
        ({"recurrent": (False, True, False, False), "recurrent_bytes": 1000}, 3 * 4 * 128 * 2 * 8192),
    ],
)
def test_caches_by_arithmetic(changes: dict[str, object], kv: int) -> None:
    shape = msgspec.structs.replace(KNOWN, **changes)
    found = plan_by_formula(shape, 8192, 512, 1, "f16", "enabled")
    assert sum(cache.total_bytes for cache in found.caches) == kv
    assert found.recurrent_bytes == sum(shape.recurrent) * shape.recurrent_bytes
    halves = plan_by_formula(shape, 8192, 512, 1, "q8_0", "enabled")
    assert sum(cache.total_bytes for cache in halves.caches) == pytest.approx(kv * 34 / 64)
    with pytest.raises(UntrustedError, match="is not known"):
        plan_by_formula(shape, 8192, 512, 1, "fp8", None)


def test_compute_grows_by_masks_or_by_scores() -> None:
    def at(context: int, flash: str) -> int:
        return plan_by_formula(KNOWN, context, 512, 1, "f16", flash).compute_bytes

    assert at(16_384, "enabled") - at(8192, "enabled") == 8192 * 2 * 512
    assert at(16_384, "disabled") - at(8192, "disabled") == 8192 * 4 * 17 * 512


def test_flash_attention_copies_a_layer_of_an_f32_cache_for_each_slot() -> None:
    """Measured (llama, 32 heads of 64, 65,536 tokens): compute of 604 MiB, 508 more than with an f16 cache."""

    def at(kind: str, flash: str, slots: int = 1) -> int:
        return plan_by_formula(KNOWN, 8192, 512, slots, kind, flash).compute_bytes

    layer = 4 * 128 * 2 * 8192
    assert at("f32", "enabled", 2) - at("f16", "enabled", 2) == 2 * layer
    assert at("f32", "disabled") == at("f16", "disabled")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"llama.attention.sliding_window": 4096}, {"known": False}),  # which layers have it is not said
        ({"llama.attention.kv_lora_rank": 64, "llama.attention.key_length_mla": 32}, {"value_length": 0}),
        ({"llama.shortconv.l_cache": 3}, {"recurrent_bytes": 2 * 512 * 4}),
        (SSM, {"recurrent_bytes": (3 * 1024 + 16 * 1024) * 4}),
    ],
)
def test_shapes_of_headers(extra: dict[str, int], expected: dict[str, object], tmp_path: Path) -> None:
    found = shape_of(read_header(write_gguf(tmp_path / "x.gguf", extra={**SHAPE, **extra})))
    assert found is not None
    assert {name: getattr(found, name) for name in expected} == expected
    assert shape_of(read_header(write_gguf(tmp_path / "bare.gguf"))) is None


def test_what_no_header_decides_stays_unknown(tmp_path: Path, no_engine: None) -> None:
    one = ask(write_gguf(tmp_path / "bare.gguf"), tmp_path, 24 * GIB)
    assert one.verdict == "unknown"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    one = ask(tmp_path / "broken.gguf", tmp_path, 24 * GIB)
    assert (one.verdict, one.details) == ("unknown", None)
    assert "truncated" in str(one.reason)


def test_a_model_that_the_engine_refuses_is_not_estimated(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic from a header said FITS of a model that no engine here knows."""
    log = "E llama_model_load: error loading model: error loading model architecture: unknown model architecture: 'new'\n"

    def refused(planner: planning.Planner, _: LoadRequest) -> None:
        planner.refused = refusal(log)

    monkeypatch.setattr(planning.Planner, "_run", refused)
    one = ask(model, tmp_path, 24 * GIB)
    assert one.verdict == "unknown"
    assert "unknown model architecture: 'new'" in str(one.reason)
    assert refusal("E llama_model_load: error loading model: unable to allocate CPU buffer\n") is None


@pytest.mark.requires("embedded")
def test_the_embedded_engine_plans_without_memory(tmp_path: Path) -> None:
    from tests.support.models import KV_PER_TOKEN, write_tiny_llama

    path = write_tiny_llama(tmp_path / "tiny.gguf")
    planner = planning.Planner(path, "key", Options())
    found = planner.plan(LoadRequest(context=8192, num_batch=512))
    assert found is not None
    assert sum(cache.total_bytes for cache in found.caches) == 8192 * KV_PER_TOKEN
    assert found.flash_attention == "enabled"
    assert planner.prepare([LoadRequest(context=8192, num_batch=512)])
