"""Calibrations that differ in all that a verdict goes by, for the page's planner and the Python rules to agree on."""

from __future__ import annotations

import random
from typing import Literal

import msgspec

from harness.fit.constants import fit_record
from harness.model.calibration import Band, Calibration, DepthSpeed, Performance, Placement, SplitCompute
from harness.model.record import Gpu
from harness.prediction.verdict import Verdict
from tests.support.records import load, record
from tests.support.vllm_artifacts import vllm_calibration

FIELDS = {
    "verdict": "verdict",
    "required_bytes": "required",
    "reserve_bytes": "reserve",
    "available_bytes": "available",
    "short_bytes": "short",
    "tight": "tight",
    "layers_total": "layersTotal",
    "layers_offloaded": "layersOffloaded",
    "layers_overflowing": "layersOverflowing",
    "decode_tokens_per_s": "decode",
}


def base(name: str = "made-up", target: Literal["gpu", "host"] = "gpu") -> Calibration:
    measured = record(load(8192), load(16384), load(32768))
    found = fit_record(msgspec.structs.replace(measured, model=msgspec.structs.replace(measured.model, name=name)))
    gpus = (Gpu(name="Made-up 24 GB"),) if target == "gpu" else ()
    machine = msgspec.structs.replace(found.metadata.machine, target=target, gpus=gpus)
    speeds = Performance(
        load_s=1.0,
        prompt_tokens_per_s=900.0,
        decode_tokens_per_s=62.0,
        host_decode_tokens_per_s=5.5,
        depths=(DepthSpeed(depth=64, decode_tokens_per_s=62.0), DepthSpeed(depth=1536, decode_tokens_per_s=58.0)),
    )
    return with_metadata(found, performance=speeds, machine=machine)


def with_metadata(calibration: Calibration, **changes: object) -> Calibration:
    metadata = msgspec.structs.replace(calibration.metadata, **changes)
    return msgspec.structs.replace(calibration, metadata=metadata)


def zoo(rng: random.Random) -> dict[str, Calibration]:
    """Calibrations that differ in all that a verdict goes by: engine and version, bands, layers, experts, dry runs, target."""
    plain = base()
    layers = plain.metadata.model.layers or 0
    weights = plain.metadata.breakdown_gb.weights or 0.0
    each = tuple(round(weights * 0.8 / layers * rng.uniform(0.7, 1.3), 6) for _ in range(layers))
    grid = tuple(
        SplitCompute(layers=count, context=context, compute_gb=round(0.06 + context / 1e6 + 0.01 * (layers - count), 6))
        for count in (5, layers)
        for context in (4096, 16384, 32768)
    )
    hybrid = Placement(
        reserve_gb=1.0,
        layer_weights_gb=round(sum(each), 6),
        output_weights_gb=0.2,
        split_compute=grid,
        layer_kinds="rrrf" * (layers // 4),
        layers_gb=each,
    )
    experts = Placement(
        reserve_gb=1.0,
        layer_weights_gb=round(weights * 0.9, 6),
        output_weights_gb=0.1,
        split_compute=(*grid, SplitCompute(layers=layers + 1, context=8192, compute_gb=0.11, experts_on_host=True)),
        layers_gb=tuple(one / 8 for one in each),
        experts_gb=tuple(one * 7 / 8 for one in each),
        expert_use=0.25,
    )
    found = {
        "plain": plain,
        "hybrid": with_metadata(plain, placement=hybrid),
        "experts": with_metadata(plain, placement=experts),
    }
    band = plain.metadata.bands[-1]
    bands = tuple(
        Band(
            up_to=131072,
            num_batch=batch,
            base_vram_gb=round(band.base_vram_gb + batch / 10240, 6),
            kv_cache_gb_per_10k=band.kv_cache_gb_per_10k,
            compute_gb_per_10k=round(batch / 53687.0912, 6),
            fixed_cache_gb=band.fixed_cache_gb,
        )
        for batch in (512, 1024, 2048)
    )
    estimates = msgspec.structs.replace(hybrid, estimate_base_gb=4.3, estimate_gb_per_10k=0.27)
    for name, version in (("new", "0.33.0"), ("plain-attention", "0.33.0"), ("go", "0.20.2"), ("old", "0.6.2")):
        engine = msgspec.structs.replace(plain.metadata.engine, version=version)
        changed = with_metadata(
            plain, engine=engine, bands=bands, placement=estimates if name == "new" else plain.metadata.placement
        )
        attention = "disabled" if name == "plain-attention" else "enabled"
        settings = msgspec.structs.replace(
            plain.metadata.settings, flash_attention=attention, num_parallel=2 if name == "go" else 1
        )
        found[f"ollama-{name}"] = msgspec.structs.replace(with_metadata(changed, settings=settings), engine="ollama")
    old = found["ollama-go"].metadata.engine
    found["go-experts"] = msgspec.structs.replace(with_metadata(plain, placement=experts, engine=old), engine="ollama")
    below = msgspec.structs.replace(band, up_to=4608, base_vram_gb=round(band.base_vram_gb + 0.05, 6))
    found["window"] = with_metadata(plain, bands=(below, band))
    found["host"] = base(target="host")
    found["pair"] = with_metadata(
        plain, machine=msgspec.structs.replace(plain.metadata.machine, gpus=(Gpu(name="one"), Gpu(name="two")))
    )
    found["vllm"] = vllm_calibration()
    return found


def expected(verdict: Verdict) -> dict[str, object]:
    return {name: getattr(verdict, field) for field, name in FIELDS.items()}
