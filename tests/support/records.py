"""Records of made-up loads that obey known constants."""

from __future__ import annotations

from harness.model.facts import DeviceFacts, LoadFacts
from harness.model.record import EngineVersion, Load, LoadRequest, Machine, Model, Record, Settings
from harness.model.trace import Plateau
from harness.units import GIB, MIB

WEIGHTS = 4 * GIB
OVERHEAD = 300 * MIB
WINDOW = 15 * MIB
KV_PER_TOKEN = 28_672
COMPUTE_START = 64 * MIB


def facts(context: int, batch: int = 512, parallel: int = 1, **changes: object) -> LoadFacts:
    """A load on CUDA0: KV and compute are straight lines, the window cache is constant."""
    values: dict[str, object] = {
        "engine": "llama-server",
        "dialect": "llama.cpp",
        "context_cells": context * parallel,
        "parallel": parallel,
        "kv_cache_type": "f16",
        "flash_attention": "enabled",
        "num_batch": batch,
        "layers_offloaded": 29,
        "layers_total": 29,
        "complete": True,
        "devices": {
            "CPU_Mapped": DeviceFacts(kind="host", weights_bytes=200 * MIB),
            "CUDA0": DeviceFacts(
                kind="gpu",
                weights_bytes=WEIGHTS,
                kv_cache_bytes=parallel * (WINDOW + KV_PER_TOKEN * context),
                compute_bytes=COMPUTE_START * batch // 512 + 2 * batch * context,
            ),
        },
    }
    values.update(changes)
    return LoadFacts(**values)  # type: ignore[arg-type]


def load(context: int, batch: int = 512, overhead: int = OVERHEAD, parallel: int = 1, **changes: object) -> Load:
    """A measured load."""
    seen = facts(context, batch, parallel, **changes)
    logged = sum(
        seen.total(part, "gpu") or 0 for part in ("weights_bytes", "kv_cache_bytes", "compute_bytes", "recurrent_bytes")
    )
    plateau = Plateau(total_bytes=logged + overhead, spread_bytes=0, readings=5)
    return Load(request=LoadRequest(context=context, num_batch=batch), outcome="ok", facts=seen, idle=plateau, busy=plateau)


def record(*loads: Load, limits: tuple[tuple[int, int], ...] = (), train: int = 131072) -> Record:
    """A complete run of these loads, measured by NVML."""
    return Record(
        run="20261124T000000Z-llama-server-made-up",
        harness_version="0",
        started_at="2026-11-24T00:00:00Z",
        status="complete",
        id="llama-server/made-up",
        engine_name="llama-server",
        model=Model(name="made-up", train_context=train, layers=28),
        engine=EngineVersion(version="b1"),
        settings=Settings(),
        machine=Machine(target="gpu", sandbox="process", meter="nvml"),
        batch_limits=limits,
        loads=loads,
    )
