"""A load while its lines are still coming.

A load has a model, perhaps a draft model beside it, and projectors. Each model is read in passes (a fit probe, a try that
failed, then the one that counts) and has contexts with caches. Figures of one pass add; a new pass drops the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from harness.logs import oldest
from harness.logs.doubts import examine
from harness.logs.oldest import Part
from harness.logs.parts import MANY, META, Cache, Context, LoggedModel, Projector
from harness.model.facts import (
    CacheFacts,
    DeviceFacts,
    Dialect,
    EngineName,
    FitFacts,
    FitRow,
    LoadFacts,
    device_kind,
)
from harness.units import MIB

Flash = Literal["enabled", "disabled"]


class Building:
    """Collects one load; :meth:`facts` freezes it."""

    def __init__(self, number: int = 0, addresses: dict[str, str] | None = None) -> None:
        self.number = number  # of the load in its log
        self.addresses = dict(addresses or {})  # of remote devices, to their names
        self.engine: EngineName = "llama-server"
        self.dialect: Dialect = "llama.cpp"
        self.lines = 0
        self.started = False  # a marker or "loading model" began it, not a figure in the middle
        self.seen = False
        self.complete = False
        self.failure: str | None = None
        self.given_up = False  # failed before it had any tensors
        self.retrying = False
        self.model: str | None = None
        self.version: str | None = None
        self.asked: dict[str, str] = {}
        self.parallel: int | None = None
        self.slots: int | None = None
        self.slot_cells: int | None = None
        self.context_cells: int | None = None
        self.kv_types: tuple[str, str] | None = None
        self.flash: Flash | None = None
        self.flash_said = False
        self.num_batch: int | None = None
        self.offloaded: tuple[int, int] | None = None
        self.overflow: dict[str, int] = {}
        self.nothing_overflows = False
        self.train_context: int | None = None
        self.graph_splits: int | None = None
        self.seconds: float | None = None
        self.sched_copies: int | None = None
        self.fit_rows: list[FitRow] = []
        self.fit_used: dict[str, int] = {}
        self.fit_done = self.fits = False  # a fit has come to its end, has begun
        self.held: list[FitRow] = []  # the table of an engine that ends
        self.reading: list[FitRow] = self.fit_rows
        self.layer_kinds: dict[int, str] = {}
        self.projected: int | None = None
        self.free: int | None = None
        self.target: int | None = None
        self.models = [LoggedModel()]
        self.projectors: list[Projector] = []
        self.oldest: dict[str, int] = {}
        self.oldest_device = "CUDA0"
        self.go: dict[tuple[str, Part], tuple[int, int]] = {}
        self.go_exact: dict[tuple[str, Part], int] = {}
        self.go_last: Part | None = None
        self.go_engine = False
        self.go_uncached = False
        self.llama_engine = False
        self.estimated = False

    @property
    def current(self) -> LoggedModel:
        """The model whose lines are coming: the load's own, or its draft."""
        return self.models[-1]

    @property
    def whole(self) -> bool:
        """Whether the load's own model has caches and compute buffers, and its weights are no probe's."""
        main = self.models[0]
        last = main.contexts[-1] if main.contexts else None
        made = last is not None and last.reserved and bool(last.caches or last.kv_total is not None)
        return made and any(main.weights.values() or (1,))

    @property
    def drafts(self) -> bool:
        """Whether a draft was announced."""
        return any(model.draft or any(context.draft for context in model.contexts) for model in self.models)

    @property
    def progress(self) -> bool:
        """Whether anything of the load itself was seen."""
        return self.seen or self.complete or self.failure is not None or self.projects or bool(self.held)

    @property
    def projects(self) -> bool:
        """Whether the engine said what it is going to need."""
        return bool(self.fit_rows or self.fit_used or self.projected is not None)

    def restart(self, model: LoggedModel) -> None:
        """A new pass of ``model``: drop the one before, which was a fit probe or a try that failed."""
        overridden = model.overridden if model.contexts == [] else set()
        model.clear()
        model.overridden = overridden
        self.failure = None
        self.retrying = False
        if model is self.models[0]:
            if self.held:  # it was the projection of a probe
                self.fit_rows, self.held = self.held, []
            del self.models[1:]
            self.projectors.clear()
            self.oldest.clear()

    @property
    def own(self) -> bool:
        """Whether llama.cpp itself said what it allocated."""
        return bool(self.oldest.keys() - {"kv"}) or any(model.used for model in self.models)

    def kinds(self) -> str | None:
        """A letter for each layer, if the log names any."""
        if not self.layer_kinds:
            return None
        return "".join(self.layer_kinds.get(index, "-") for index in range(max(self.layer_kinds) + 1))

    def device(self, name: str, *, address: str = "") -> str:
        """The device of a buffer type: a remote one by its address, Metal's without its mapping, ``CUDA0_Split`` on ``CUDA0``.

        llama.cpp calls the first device of every RPC server ``RPC0[host:port]`` in buffers. Before 2025-10 a device was named
        by its address alone (``RPC[host:port]``), which is kept.
        """
        short, bracket, rest = name.partition("[")
        address = address or rest.rstrip("]")
        if address and short[-1:].isdigit():
            taken, number = set(self.addresses.values()), 0
            if bracket and address not in self.addresses and short in taken:
                while f"RPC{number}" in taken:
                    number += 1
                short = f"RPC{number}"
            if not bracket or address not in self.addresses:
                if len(self.addresses) < MANY:
                    self.addresses[address] = short
                return short
            return self.addresses[address]
        if bracket:
            self.addresses.setdefault(address, name)
            return name
        for suffix in ("_Mapped", "_Private"):
            if short.endswith(suffix) and short.startswith(("MTL", "Metal")):
                return short.removesuffix(suffix)
        if short.endswith("_Split") and short[: -len("_Split")][-1:].isdigit():
            return short.removesuffix("_Split")
        return short.removesuffix("-REPACK")

    def devices(self) -> dict[str, DeviceFacts]:
        """All parts by device: caches, contexts, models and projectors add."""
        totals: dict[str, dict[str, int]] = {}
        figures = list(self._figures())
        for device, part, size in figures or [(*where, size) for where, (size, _) in self._go_figures().items()]:
            if device in totals or len(totals) < MANY:
                parts = totals.setdefault(device, {})
                parts[f"{part}_bytes"] = parts.get(f"{part}_bytes", 0) + size
        addresses = {name: address for address, name in self.addresses.items()}
        rows = () if totals else self.held or self.fit_rows
        if rows:
            # Whole MiB, cut off: half of one is nearest. What a device does not hold is printed as 0.
            kept = (("weights", "model"), ("kv_cache", "context"), ("compute", "compute"))
            totals = {
                row.device: {f"{part}_bytes": size + MIB // 2 for part, name in kept if (size := getattr(row, f"{name}_bytes"))}
                for row in rows
            }
        return {
            name: DeviceFacts(kind=device_kind(name), address=addresses.get(name), **parts) for name, parts in totals.items()
        }

    def _figures(self) -> Iterator[tuple[str, Part, int]]:
        """Every figure of llama.cpp's: device, part, bytes."""
        for model in self.models:
            yield from ((device, "weights", size) for device, size in model.weights.items() if device != META)
            yield from ((device, "lora", size) for device, size in model.lora.items())
        for projector in self.projectors:
            if projector.weights:
                yield self._projector_device(projector.device), "projector", projector.weights
            yield from ((self._projector_device(place), "compute", size) for place, size in projector.compute.items())
        for context in self.contexts():
            for cache in context.caches:
                if cache.total is not None and (not cache.devices or META in cache.devices):
                    yield META if META in cache.devices else self._cache_device(), "kv_cache", cache.total
                else:
                    yield from ((device, "kv_cache", size) for device, size in cache.devices.items())
            if context.kv_total is not None and not context.caches:
                yield self._cache_device(), "kv_cache", context.kv_total
            yield from ((device, part, size) for (device, part), size in context.parts.items() if device != META)
        if self.oldest.keys() - {"kv"}:
            has_cache = any(context.caches for context in self.contexts())
            found = oldest.spread(self.oldest, self.oldest_device, has_cache=has_cache)
            yield from ((device, part, size) for (device, part), size in found.items())

    def _cache_device(self) -> str:
        """Where a cache is whose buffers the log does not name: on the only device that has all layers, or on the host."""
        gpus = [device for device in self.models[0].weights if device_kind(device) == "gpu"]
        if not gpus:
            return "CPU"
        whole = self.offloaded is not None and self.offloaded[0] == self.offloaded[1]
        return gpus[0] if len(gpus) == 1 and whole else "unknown"

    def contexts(self) -> Iterator[Context]:
        """Every context of the load."""
        for model in self.models:
            yield from model.contexts

    def _projector_device(self, name: str) -> str:
        """``CLIP using CUDA backend`` (before 2025) means the first device of that name."""
        if name in ("CUDA", "ROCm", "Vulkan", "SYCL", "CANN", "MUSA"):
            return f"{name}0"
        return name

    def _go_figures(self) -> dict[tuple[str, Part], tuple[int, int]]:
        """The Go engine's figures and how far they may be off; parts that stand in bytes at DEBUG are exact."""
        exact = {part for (_, part), size in self.go_exact.items() if size}
        figures: dict[tuple[str, Part], tuple[int, int]] = {
            where: size for where, size in self.go.items() if where[1] not in exact
        }
        figures.update({where: (size, 0) for where, size in self.go_exact.items() if size})
        return figures

    @property
    def uncertainty(self) -> int:
        """How far the worst figure may be off, bytes (the Go engine prints a tenth of its unit, a breakdown whole MiB)."""
        if self.own:
            return 0
        return max((off for _, off in self._go_figures().values()), default=MIB // 2 if self.held or self.fit_rows else 0)

    def caches(self) -> tuple[CacheFacts, ...]:
        """Every cache that the log distinguishes."""
        return tuple(
            CacheFacts(
                cells=cache.cells,
                streams=cache.streams,
                layers=cache.layers,
                role="draft" if context.draft else "window" if cache.window else "full",
                devices=dict(cache.devices),
            )
            for context in self.contexts()
            for cache in context.caches
        )

    def _all_caches(self) -> list[tuple[bool, Cache]]:
        return [(context.draft, cache) for context in self.contexts() for cache in context.caches]

    def cells(self) -> int | None:
        """Cells of the largest cache over all streams, else the context as printed, else as asked for."""
        caches = [cache for _, cache in self._all_caches() if cache.cells]
        counted = [(cache.cells or 0) * cache.streams for cache in caches]
        if not all(cache.sized for cache in caches):
            counted.append(self.context_cells or 0)  # streams are not known yet
        asked = self.asked.get("cells", "")
        said = max(counted, default=0) or self.context_cells or self.slot_cells
        return said or (int(asked) if asked.isdecimal() else None) or None

    def kv_cache_type(self) -> str | None:
        """The types of K and V of the largest cache of the model itself."""
        typed = [(cache.size, cache.types) for draft, cache in self._all_caches() if cache.types and not draft]
        types = max(typed, key=lambda one: one[0])[1] if typed else self.kv_types
        if types is None and "type_k" in self.asked:
            types = (self.asked["type_k"], self.asked.get("type_v", self.asked["type_k"]))
        if types is None:
            return None
        key, value = types
        return key if key == value else f"{key}/{value}"

    def _parallel(self) -> int | None:
        slots = [cache.slots for draft, cache in self._all_caches() if cache.slots and not draft]
        asked = self.asked.get("parallel", "")
        return self.parallel or self.slots or max(slots, default=None) or (int(asked) if asked.isdecimal() else None) or None

    def _overflowing(self) -> int | None:
        if self.overflow:
            return sum(self.overflow.values())
        return 0 if self.nothing_overflows else None

    def _flash(self) -> Flash | None:
        if self.flash is not None or self.flash_said:
            return self.flash
        answers: dict[str | None, Flash] = {"on": "enabled", "off": "disabled"}
        return answers.get(self.asked.get("flash"))

    def _optional(self) -> dict[str, int]:
        """What the parts take that a user may leave out."""
        projectors = sum(one.weights + sum(one.compute.values()) for one in self.projectors)
        drafts = sum(sum(model.weights.values()) for model in self.models if model.draft)
        for context in self.contexts():
            if context.draft:
                drafts += sum(cache.size for cache in context.caches) + sum(context.parts.values())
        return {name: size for name, size in (("projector", projectors), ("draft", drafts)) if size}

    def facts(self) -> LoadFacts:
        """The load as it stands."""
        quoted = self.fit_rows and not (self.fits or self.started or self.own or self.held)
        if quoted and all(
            (row.total_bytes or 0) - (row.free_bytes or 0) >= row.self_bytes for row in self.fit_rows if row.total_bytes
        ):
            self.held, self.fit_rows = self.fit_rows, []  # a table that no fit announced, and the devices lack what it says
        fit = None
        if self.projects:
            fit = FitFacts(
                rows=tuple(self.fit_rows),
                used=dict(self.fit_used),
                projected_bytes=self.projected,
                free_bytes=self.free,
                target_bytes=self.target,
            )
        batch = self.asked.get("batch", "")
        projected = self.fit_rows or (self.projects and not self.complete)
        guessed = bool(self.go) if self.estimated else bool(projected) and not self.go and not self.held
        doubts, checked = examine(self)
        return LoadFacts(
            engine=self.engine,
            dialect=self.dialect,
            model=self.model or self.models[0].path,
            context_cells=self.cells(),
            parallel=self._parallel(),
            layers_overflowing=self._overflowing(),
            kv_cache_type=self.kv_cache_type(),
            flash_attention=self._flash(),
            num_batch=self.num_batch or (int(batch) if batch.isdecimal() else None) or None,
            layers_offloaded=self.offloaded[0] if self.offloaded else None,
            layers_total=self.offloaded[1] if self.offloaded else None,
            complete=self.complete,
            failed=self.failure is not None and not self.complete,
            failure=None if self.complete else self.failure,
            estimated=guessed and not self.own,
            devices=self.devices(),
            sched_copies=self.sched_copies,
            overridden_tensors=len(self.models[0].overridden) or None,
            optional_bytes=self._optional(),
            doubts=doubts,
            checked=checked,
            engine_version=self.version,
            caches=self.caches(),
            graph_splits=self.graph_splits,
            train_context=self.train_context,
            fit=fit,
            layer_kinds=self.kinds(),
            load_seconds=self.seconds,
            uncertainty_bytes=self.uncertainty,
        )
