"""Models whose memory is known: what a load of them would log and what a meter would read, to the log's two decimals."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from harness.fit.load_plan import BatchLimits, further_loads, plan_loads
from harness.model.facts import CacheFacts, DeviceFacts, LoadFacts
from harness.model.record import Load, LoadRequest, Machine, Record
from harness.model.trace import Plateau
from harness.units import MIB, pad_cells
from tests.support.records import record

GPU = "CUDA0"


def logged(size: float) -> int:
    """A size as ``%8.2f MiB`` prints it."""
    return round(round(size / MIB, 2) * MIB)


class TrueModel(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, as llama.cpp spends them.

    ``start`` is compute for each row of a batch, ``step`` what it takes more for each row while a window is not full, which
    happens without flash attention. ``cell_bytes`` is the bookkeeping of a cell, beside the log: then it is on the host.
    """

    weights: int
    overhead: int
    kv_per_cell: int
    window: int = 0
    window_per_cell: int = 0
    recurrent: int = 0
    heads: int = 16
    flash_attention: bool = True
    start: int = 20_000
    step: int = 0
    train_context: int = 131_072
    cell_bytes: int = 0

    def row(self) -> int:
        return 2 if self.flash_attention else 4 * (self.heads + 1)

    def window_cells(self, context: int, batch: int) -> int:
        return min(pad_cells(context), pad_cells(self.window + batch)) if self.window else 0

    def caches(self, context: int, batch: int) -> tuple[int, int]:
        return self.kv_per_cell * pad_cells(context), self.window_per_cell * self.window_cells(context, batch)

    def compute(self, context: int, batch: int) -> int:
        cells, window_cells = pad_cells(context), self.window_cells(context, batch)
        mask = 2 if self.flash_attention else 4
        step = self.step if cells <= window_cells and not self.flash_attention else 0
        return batch * (self.start + step + self.row() * cells + mask * window_cells)

    def truth(self, context: int, batch: int, slots: int = 1) -> int:
        """All memory of the device."""
        cells = pad_cells(context) + self.window_cells(context, batch)
        cache = sum(self.caches(context, batch)) + self.recurrent + self.cell_bytes * cells
        return self.weights + self.overhead + slots * cache + self.compute(context, batch)

    def load(self, request: LoadRequest, slots: int = 1) -> Load:
        context, batch = request.context, request.num_batch or 512
        full, window = (logged(slots * size) for size in self.caches(context, batch))
        name = "CPU" if self.cell_bytes else GPU
        caches = [CacheFacts(cells=pad_cells(context), streams=slots, devices={name: full})]
        if self.window:
            cells = self.window_cells(context, batch)
            caches.append(CacheFacts(cells=cells, streams=slots, role="window", devices={name: window}))
        device = DeviceFacts(
            kind="host" if self.cell_bytes else "gpu",
            weights_bytes=logged(self.weights),
            kv_cache_bytes=full + window,
            recurrent_bytes=logged(slots * self.recurrent) if self.recurrent else None,
            compute_bytes=logged(self.compute(context, batch)),
        )
        facts = LoadFacts(
            engine="llama-server",
            dialect="llama.cpp",
            context_cells=pad_cells(context) * slots,
            parallel=slots,
            kv_cache_type="f16",
            flash_attention="enabled" if self.flash_attention else "disabled",
            num_batch=min(batch, pad_cells(context)),
            layers_offloaded=17,
            layers_total=17,
            complete=True,
            caches=tuple(caches),
            devices={name: device},
        )
        plateau = Plateau(total_bytes=self.truth(context, batch, slots), spread_bytes=0, readings=5)
        return Load(request=request, outcome="ok", facts=facts, idle=plateau, busy=plateau)

    def run(self, limits: BatchLimits = (), slots: int = 1, contexts: tuple[int, ...] = (8192, 16384, 32768)) -> Record:
        """The record of the default plan, with the loads that it asks for further."""
        planned = plan_loads(contexts, self.train_context, batch_limits=limits, num_parallel=slots)
        made = record(*(self.load(one, slots) for one in planned), limits=limits, train=self.train_context)
        if self.cell_bytes:
            made = msgspec.structs.replace(made, machine=Machine(target="host", sandbox="process", meter="host"))
        return msgspec.structs.replace(made, loads=(*made.loads, *(self.load(one, slots) for one in further_loads(made))))


#: From here on the plan's loads say where a window is full.
SMALLEST = 2048

MODELS = st.builds(
    TrueModel,
    weights=st.integers(64 * MIB, 40_000 * MIB),
    overhead=st.integers(0, 700 * MIB),
    kv_per_cell=st.integers(256, 300_000),
    window=st.sampled_from([0, 128, 512, 1024, 4096]),
    window_per_cell=st.integers(256, 300_000),
    recurrent=st.sampled_from([0, 31_457, 60 * MIB]),
    heads=st.integers(1, 64),
    flash_attention=st.booleans(),
    start=st.integers(4_000, 200_000),
    step=st.sampled_from([0, 8192]),
    train_context=st.sampled_from([8192, 32_768, 40_960, 131_072]),
)
