"""Calibrations of vLLM made of figures, for tests of what is computed from them."""

from __future__ import annotations

from harness.model.calibration import (
    Band,
    Breakdown,
    Calibration,
    Constants,
    KvBlocks,
    MeasuredLoad,
    Metadata,
    Performance,
    Placement,
    Quality,
)
from harness.model.record import EngineVersion, Gpu, Machine, Model, Settings, VllmSettings
from harness.units import TOKENS_PER_UNIT, gib


def vllm_calibration(
    *,
    version: str = "0.29.0",
    total: int = 80 << 30,
    weights: int = 15 << 30,
    budget: int = 17 << 30,
    footprint: int = 17 << 30,
    blocks: KvBlocks | None = None,
    valid_to: int = 131072,
    tensor_parallel: int = 1,
    max_num_seqs: int = 64,
    arguments: tuple[str, ...] = (),
) -> Calibration:
    blocks = blocks or KvBlocks(size=16, bytes=2 << 20)
    fixed = gib(blocks.fixed * blocks.bytes)
    base = round(gib(footprint) + fixed, 6)
    slope = gib(blocks.per_block * blocks.bytes / blocks.size * TOKENS_PER_UNIT)
    return Calibration(
        id="vllm/acme--tern-8b",
        engine="vllm",
        constants=Constants(base_vram_gb=base, kv_cache_gb_per_10k=slope),
        metadata=Metadata(
            schema_version=1,
            calibrated_at="2026-11-01T00:00:00Z",
            model=Model(name="acme/tern-8b", train_context=valid_to),
            engine=EngineVersion(version=version, image="vllm/vllm-openai:v1", image_digest=f"sha256:{'00' * 32}"),
            settings=Settings(
                kv_cache_type="bfloat16",
                vllm=VllmSettings(
                    model="acme/tern-8b",
                    tensor_parallel=tensor_parallel,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=2048,
                    dtype="bfloat16",
                    arguments=arguments,
                ),
            ),
            machine=Machine(
                target="gpu",
                sandbox="docker",
                meter="nvml",
                gpus=tuple(Gpu(name="Acme T1", memory_gb=gib(total)) for _ in range(tensor_parallel)),
                total_cuda_gb=gib(total),
            ),
            breakdown_gb=Breakdown(
                weights=gib(weights),
                fixed_cache=fixed,
                compute=0.0,
                overhead=round(base - gib(weights) - fixed, 6),
                budget=gib(budget),
            ),
            bands=(
                Band(
                    up_to=valid_to,
                    num_batch=2048,
                    base_vram_gb=base,
                    kv_cache_gb_per_10k=slope,
                    compute_gb_per_10k=0.0,
                    fixed_cache_gb=fixed,
                ),
            ),
            quality=Quality(
                loads=(MeasuredLoad(context=valid_to, num_batch=2048, total_gb=base),),
                max_error=0.0,
                overhead_spread_gb=None,
                valid_to=valid_to,
            ),
            placement=Placement(reserve_gb=None, layer_weights_gb=None, output_weights_gb=None),
            performance=Performance(
                load_s=None, prompt_tokens_per_s=None, decode_tokens_per_s=None, host_decode_tokens_per_s=None
            ),
            run=None,
            kv_blocks=blocks,
        ),
    )
