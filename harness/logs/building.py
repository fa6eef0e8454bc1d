"""A load while its lines are still coming."""

from __future__ import annotations

from typing import Literal

from harness.core.facts import (
    CacheFacts,
    DeviceFacts,
    Dialect,
    EngineName,
    FitFacts,
    FitRow,
    LoadFacts,
    device_kind,
)

Part = Literal["weights", "kv_cache", "recurrent", "compute", "output", "projector", "lora"]


class Context:
    """One llama_context of a load (a draft model has its own): its caches and its compute buffers."""

    def __init__(self, draft: bool = False) -> None:
        self.draft = draft
        self.caches: list[Cache] = []
        self.parts: dict[tuple[str, Part], int] = {}


class Cache:
    """One KV cache of a context."""

    def __init__(self, cells: int | None = None, window: bool = False) -> None:
        self.cells, self.window = cells, window
        self.streams = 1
        self.layers: int | None = None
        self.sized = False
        self.devices: dict[str, int] = {}


class Building:
    """Collects one load; :meth:`facts` freezes it."""

    def __init__(self, engine: EngineName = "llama-server", dialect: Dialect = "llama.cpp") -> None:
        self.engine, self.dialect = engine, dialect
        self.model: str | None = None
        self.version: str | None = None
        self.parallel: int | None = None
        self.context_cells: int | None = None
        self.kv_types: tuple[str, str] | None = None
        self.kv_type: str | None = None
        self.flash: Literal["enabled", "disabled"] | None = None
        self.num_batch: int | None = None
        self.offloaded: tuple[int, int] | None = None
        self.overflowing: int | None = None
        self.complete = False
        self.failure: str | None = None
        self.estimated = False
        self.train_context: int | None = None
        self.graph_splits: int | None = None
        self.seconds: float | None = None
        self.fit_rows: list[FitRow] = []
        self.layer_kinds: dict[int, str] = {}
        self.projected: int | None = None
        self.free: int | None = None
        self.target: int | None = None
        self.weights: dict[str, int] = {}
        self.lora: dict[str, int] = {}
        self.projector: dict[str, int] = {}
        self.projector_compute: dict[str, int] = {}
        self.projector_device: str | None = None
        self.contexts: list[Context] = []
        self.go: dict[tuple[str, Part], int] = {}
        self.go_exact: set[tuple[str, Part]] = set()
        self.go_measured = False
        self.uncertainty = 0
        self.seen = False

    @property
    def context(self) -> Context:
        """The context whose lines are coming."""
        if not self.contexts:
            self.contexts.append(Context())
        return self.contexts[-1]

    def restart(self) -> None:
        """Drop what an earlier pass of the same load said: a fit probe, or a try that failed."""
        self.weights.clear()
        self.lora.clear()
        self.contexts.clear()
        self.failure = None

    def kinds(self) -> str | None:
        """A letter for each layer, if the log names any."""
        if not self.layer_kinds:
            return None
        return "".join(self.layer_kinds.get(index, "-") for index in range(max(self.layer_kinds) + 1))

    def devices(self) -> dict[str, DeviceFacts]:
        """All parts by device: caches and contexts add."""
        totals: dict[str, dict[str, int]] = {}

        def add(device: str, part: Part, size: int) -> None:
            parts = totals.setdefault(device, {})
            parts[f"{part}_bytes"] = parts.get(f"{part}_bytes", 0) + size

        for device, size in self.weights.items():
            add(device, "weights", size)
        for device, size in self.lora.items():
            add(device, "lora", size)
        for device, size in self.projector.items():
            add(device, "projector", size)
        for device, size in self.projector_compute.items():
            add(device, "compute", size)
        for context in self.contexts:
            for cache in context.caches:
                for device, size in cache.devices.items():
                    add(device, "kv_cache", size)
            for (device, part), size in context.parts.items():
                add(device, part, size)
        if not totals:
            for (device, part), size in self.go.items():
                add(device, part, size)
        return {name: DeviceFacts(kind=device_kind(name), **parts) for name, parts in totals.items()}

    def caches(self) -> tuple[CacheFacts, ...]:
        """Every cache that the log told apart."""
        return tuple(
            CacheFacts(
                cells=cache.cells,
                streams=cache.streams,
                layers=cache.layers,
                role="draft" if context.draft else "window" if cache.window else "full",
                devices=dict(cache.devices),
            )
            for context in self.contexts
            for cache in context.caches
        )

    def cells(self) -> int | None:
        """Cells of the largest cache over all streams, else the context as printed."""
        counted = [cache.cells * cache.streams for cache in self.caches() if cache.cells]
        return max(counted) if counted else self.context_cells

    def facts(self) -> LoadFacts:
        """The load as it stands."""
        caches = self.caches()
        sized = [cache.streams for context in self.contexts for cache in context.caches if cache.sized]
        streams = max(sized, default=None)
        kv_type = self.kv_type
        if self.kv_types is not None:
            key, value = self.kv_types
            kv_type = key if key == value else f"{key}/{value}"
        fit = None
        if self.fit_rows or self.projected is not None:
            fit = FitFacts(
                rows=tuple(self.fit_rows),
                projected_bytes=self.projected,
                free_bytes=self.free,
                target_bytes=self.target,
            )
        return LoadFacts(
            engine=self.engine,
            dialect=self.dialect,
            model=self.model,
            context_cells=self.cells(),
            parallel=self.parallel or streams,
            layers_overflowing=self.overflowing,
            kv_cache_type=kv_type,
            flash_attention=self.flash,
            num_batch=self.num_batch,
            layers_offloaded=self.offloaded[0] if self.offloaded else None,
            layers_total=self.offloaded[1] if self.offloaded else None,
            complete=self.complete,
            failed=self.failure is not None and not self.complete,
            failure=None if self.complete else self.failure,
            estimated=self.estimated and not (self.weights or self.contexts),
            devices=self.devices(),
            engine_version=self.version,
            caches=caches,
            graph_splits=self.graph_splits,
            train_context=self.train_context,
            fit=fit,
            layer_kinds=self.kinds(),
            load_seconds=self.seconds,
            uncertainty_bytes=0 if self.weights or self.contexts else self.uncertainty,
        )
