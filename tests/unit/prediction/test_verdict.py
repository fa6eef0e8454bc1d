"""Verdicts of made-up calibrations: the edge, the largest context, what spills, who is evicted."""

from __future__ import annotations

import msgspec
import pytest

from harness.fit.constants import fit_record
from harness.model.calibration import Calibration, Performance, Placement
from harness.model.record import Gpu, Machine
from harness.prediction.memory import predict
from harness.units import GIB, MIB, gib
from tests.support.records import WEIGHTS, load, record
from tests.support.rules import batch_of, judge, judge_together, largest_context

RESERVE = 1024 * MIB


def calibrated(engine: str = "llama-server", version: str = "b10434", **changes: object) -> Calibration:
    """4 GiB of weights in 28 layers, 300 MiB overhead, on one GPU."""
    made = fit_record(record(load(8192), load(16384), load(32768)))
    metadata = msgspec.structs.replace(
        made.metadata,
        engine=msgspec.structs.replace(made.metadata.engine, version=version),
        placement=Placement(reserve_gb=1.0, layer_weights_gb=gib(WEIGHTS * 28 // 29), output_weights_gb=gib(WEIGHTS // 29)),
        performance=Performance(load_s=1.0, prompt_tokens_per_s=900.0, decode_tokens_per_s=60.0, host_decode_tokens_per_s=6.0),
        **changes,
    )
    return msgspec.structs.replace(made, engine=engine, id=f"{engine}/made-up", metadata=metadata)


def test_what_fits_fits_at_the_upper_end_of_the_prediction() -> None:
    calibration = calibrated()
    needed = predict(calibration, 16384)
    need, doubt = needed.total_bytes + RESERVE, needed.uncertainty_bytes
    fits = judge(calibration, 16384, 1, (need + doubt,))
    assert (fits.verdict, fits.tight, fits.margin_bytes) == ("fits", False, doubt)
    tight = judge(calibration, 16384, 1, (need + doubt - 1,))
    assert (tight.verdict, tight.tight, tight.short_bytes) == ("offload", True, 0)
    assert judge(calibration, 16384, 1, (need - doubt,)).tight
    assert not judge(calibration, 16384, 1, (need - doubt - 1,)).tight
    beyond = judge(calibration, 16384, 1, (need - 1,))
    assert (beyond.verdict, beyond.short_bytes, beyond.required_bytes) == ("offload", 1, need - RESERVE)
    assert beyond.layers_offloaded == 28
    assert beyond.layers_total == 29


def test_what_spills_is_slower_and_says_how_many_layers_stay() -> None:
    calibration = calibrated()
    full = judge(calibration, 8192, 1, (24 * GIB,))
    assert (full.decode_tokens_per_s, full.layers_offloaded) == (60.0, 29)
    half = judge(calibration, 8192, 1, (3 * GIB + 512 * MIB,))
    none = judge(calibration, 8192, 1, (RESERVE,))
    assert half.layers_offloaded is not None
    assert 12 <= half.layers_offloaded <= 15
    assert half.decode_tokens_per_s == pytest.approx(11, abs=1.5)
    assert (none.layers_offloaded, none.decode_tokens_per_s) == (0, 6.0)


def test_the_largest_context_fits_and_the_next_does_not() -> None:
    calibration = calibrated()
    for free in (5 * GIB + 600 * MIB, 6 * GIB, 7 * GIB):
        best = largest_context(calibration, 1, (free,))
        assert best is not None
        assert best % 256 == 0
        assert judge(calibration, best, 1, (free,)).verdict == "fits"
        assert judge(calibration, best + 256, 1, (free,)).verdict == "offload"
    assert largest_context(calibration, 1, (GIB,)) == 0
    assert largest_context(calibration, 1, (80 * GIB,)) == 131072
    assert largest_context(calibration, 1, None) is None


def test_slots_multiply_the_cache() -> None:
    calibration = calibrated()
    free = (predict(calibration, 16384).total_bytes + RESERVE,)
    assert judge(calibration, 16384, 2, free).verdict == "offload"
    assert judge(calibration, 4096, 2, free).verdict == "fits"


def test_beyond_the_range_is_unknown_unless_extrapolated() -> None:
    calibration = calibrated()
    beyond = judge(calibration, 200_000, 1, (80 * GIB,))
    assert beyond.verdict == "unknown"
    assert "131,072" in (beyond.reason or "")
    assert judge(calibration, 200_000, 1, (80 * GIB,), extrapolate=True).verdict == "fits"
    assert judge(calibration, 8192, 1, None).verdict == "unknown"


def test_a_calibration_of_two_gpus_answers_for_two_and_not_for_one() -> None:
    pair = Machine(target="gpu", sandbox="process", meter="nvml", gpus=(Gpu(name="a"), Gpu(name="b")))
    assert judge(calibrated(machine=pair), 8192, 1, (24 * GIB, 24 * GIB)).verdict == "fits"
    assert judge(calibrated(machine=pair), 8192, 1, (48 * GIB,)).verdict == "unknown"


def test_on_the_host_nothing_is_kept_free() -> None:
    host = calibrated(machine=Machine(target="host", sandbox="process", meter="host"))
    needed = predict(host, 8192)
    verdict = judge(host, 8192, 1, (needed.total_bytes + needed.uncertainty_bytes,))
    assert (verdict.verdict, verdict.basis, verdict.reserve_bytes) == ("fits", "host", 0)
    assert judge(host, 8192, 1, (needed.total_bytes,)).verdict == "offload"
    assert verdict.layers_offloaded is None, "host memory has no layers to offload"


def test_an_older_ollama_puts_the_output_layer_on_the_gpu_last() -> None:
    need = judge(calibrated("ollama", "0.20.2"), 8192, 1, (24 * GIB,))
    short = (need.required_bytes or 0) + (need.reserve_bytes or 0) - MIB
    assert judge(calibrated("ollama", "0.20.2"), 8192, 1, (short,)).layers_offloaded == 28
    # The 28 layers are all there; under llama.cpp the output layer is one of the 28.
    old = judge(calibrated("ollama", "0.20.2"), 8192, 1, (short,)).decode_tokens_per_s
    new = judge(calibrated("ollama", "0.33.0"), 8192, 1, (short + RESERVE - 157 * MIB,)).decode_tokens_per_s
    assert old is not None
    assert new is not None
    assert old == pytest.approx(new, rel=0.2)


@pytest.mark.parametrize(("version", "reserve"), [("0.33.0", 1024), ("0.20.2", 157), ("0.9.6", 157)])
def test_older_ollamas_keep_other_amounts_free(version: str, reserve: int) -> None:
    verdict = judge(calibrated("ollama", version), 8192, 1, (24 * GIB,))
    assert verdict.reserve_bytes == pytest.approx(reserve * MIB, abs=4096)
    assert any("estimate" in text for text in verdict.warnings) == (version == "0.9.6")


def test_a_second_model_spills_beside_llama_server_and_evicts_under_ollama() -> None:
    free = (9 * GIB,)
    mine = calibrated()
    verdicts, fates = judge_together([(mine, 8192, 1), (mine, 8192, 1)], free)
    assert fates == ["resident", "offload"]
    assert verdicts[1].available_bytes == free[0] - (verdicts[0].required_bytes or 0)
    theirs = calibrated("ollama", "0.33.0")
    assert judge_together([(theirs, 8192, 1), (theirs, 8192, 1)], free)[1] == ["evicted", "resident"]
    assert judge_together([(theirs, 8192, 1), (theirs, 8192, 1)], (24 * GIB,))[1] == ["resident", "resident"]
    assert judge_together([(theirs, 8192, 1)] * 4, (80 * GIB,))[1] == ["evicted", "resident", "resident", "resident"]


def automatic(flash: str = "enabled") -> Calibration:
    """Ollama 0.33 with a band for each batch that it chooses, and what it reckons: 4 GiB and 32 KiB a token."""
    made = calibrated("ollama", "0.33.0")
    (band,) = made.metadata.bands
    bands = tuple(
        msgspec.structs.replace(band, up_to=up_to, num_batch=batch, base_vram_gb=band.base_vram_gb + batch / 4096)
        for up_to, batch in ((4096, 512), (32768, 1024), (131072, 2048))
    )
    metadata = msgspec.structs.replace(
        made.metadata,
        bands=bands,
        settings=msgspec.structs.replace(made.metadata.settings, flash_attention=flash),
        placement=msgspec.structs.replace(
            made.metadata.placement, estimate_base_gb=4.0, estimate_gb_per_10k=gib(32768 * 10_000)
        ),
    )
    return msgspec.structs.replace(made, metadata=metadata)


@pytest.mark.parametrize(
    ("context", "slots", "free", "batch"),
    [
        (4096, 1, 24, 512),
        (8192, 1, 24, 1024),
        (2048, 4, 24, 1024),  # all slots together
        (65536, 1, 24, 2048),
        (65536, 1, 9, 1024),  # 6 GiB are above 60 % of 9, not above 75 %
        (65536, 1, 8, 512),  # 75 % would hold them, but not with the 768 MiB that the batch adds, in 80 %
        (8192, 1, 5, 512),
    ],
)
def test_ollama_takes_a_smaller_batch_where_it_thinks_that_memory_is_tight(
    context: int, slots: int, free: int, batch: int
) -> None:
    assert batch_of(automatic(), context, slots, free * GIB) == batch


def test_without_flash_attention_on_cuda_ollama_takes_one_batch() -> None:
    assert batch_of(automatic("disabled"), 65536, 1, 80 * GIB) == 512


def test_the_largest_context_looks_beyond_a_step_of_the_batch() -> None:
    calibration = automatic()
    for free in range(6, 16):
        best = largest_context(calibration, 1, (free * GIB,))
        assert best is not None
        if best:
            assert judge(calibration, best, 1, (free * GIB,)).verdict == "fits"
        beyond = [one for one in range(best + 256, 131072, 4096) if judge(calibration, one, 1, (free * GIB,)).verdict == "fits"]
        assert not beyond
