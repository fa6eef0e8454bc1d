"""Memory and speed at a context, from a calibration alone."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from harness.errors import UnknownVerdictError
from harness.model.calibration import PARTS_UNKNOWN, SPEED_UNCERTAINTY, Band, Calibration
from harness.model.trace import READING_ERROR
from harness.text import counted
from harness.units import CELL_PADDING, MIB, TOKENS_PER_UNIT, from_gib, pad_cells

#: Relative error where none was measured: a run above it is refused.
UNMEASURED_ERROR: Final = 0.01
#: Without flash attention the scores of a batch are what compute buffers grow by; with fewer tokens than this a batch's
#: activations are more (qwen2 0.5B, Ollama 0.33: 39.3 and 38.8 MiB at 768 and 512 tokens, on the line 33.5 and 26.0).
LEAST_SCORES: Final = 1024


class SpeedPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """Speeds with everything on the target; ``uncertainty`` is relative: twice the spread of repeats, 15 % at least."""

    prompt_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_at_depth_tokens_per_s: float | None
    host_decode_tokens_per_s: float | None
    uncertainty: float = SPEED_UNCERTAINTY


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one model on its target; bytes. The parts sum to ``total_bytes`` (unknown overhead counts 0).

    All parts are ``None`` where the engine's log was not understood: then the total alone was measured. The true value is
    within ``uncertainty_bytes`` of ``total_bytes``: a prediction interval, which is wider beyond the loads. ``at_most``: the
    total is a bound from above, and how much less it is was not said. ``source``: ``derived`` is calculated from one of
    other settings.
    """

    context: int
    num_parallel: int
    total_bytes: int
    weights_bytes: int | None
    fixed_cache_bytes: int | None
    context_cache_bytes: int | None
    compute_bytes: int | None
    overhead_bytes: int | None
    within_range: bool
    num_batch: int | None
    uncertainty_bytes: int
    speed: SpeedPrediction
    warnings: tuple[str, ...] = ()
    at_most: bool = False
    source: Literal["measured", "derived", "estimated", "formula"] = "measured"

    def to_json(self) -> dict[str, object]:
        """The object of ``predict --json``."""
        document: dict[str, object] = msgspec.to_builtins(self)
        document.pop("warnings")
        return document


def beyond_range(calibration: Calibration, context: int) -> str | None:
    """That a context, tokens per slot, is beyond what the calibration answers for; ``None`` where it is not."""
    valid = calibration.metadata.quality.valid_to
    return f"a context of {context:,} is beyond {valid:,}, the range of this calibration" if context > valid else None


def is_bound(calibration: Calibration, context: int) -> bool:
    """Whether memory at ``context`` tokens per slot is known as a bound alone: the model takes at most that."""
    metadata, blocks = calibration.metadata, calibration.metadata.kv_blocks
    return blocks is not None and metadata.bounded and context < (metadata.quality.valid_to if blocks.bound else blocks.size)


def predict(calibration: Calibration, context: int, num_parallel: int = 1, *, num_batch: int | None = None) -> Prediction:
    """Memory at ``context`` tokens per slot with ``num_parallel`` slots.

    ``V(C, P) = weights + compute0 + overhead + P*fixed_cache + C/10000*(P*kv + compute)``, per band of physical batch;
    contexts are padded to the 256 cells that the engine allocates (vLLM: to its blocks; its memory is that of one GPU).
    On the host each further slot adds the bookkeeping of its cells (``slot_overhead_gb``, ``slot_overhead_gb_per_10k``).
    Without flash attention compute is that of :data:`LEAST_SCORES` tokens at least. Below
    the physical batch, which the engine cuts to the context, the result is an upper bound and a warning says so.

    Args:
        calibration: the artifact.
        context: tokens per slot, above zero.
        num_parallel: slots, above zero.
        num_batch: take the band of this physical batch instead of the one the engine would choose.

    Raises:
        ValueError: context or slots below one.
        UnknownVerdictError: the parts are unknown, and the loads had another number of slots.
    """
    if context < 1 or num_parallel < 1:
        raise ValueError("context and slots must be at least 1")
    metadata = calibration.metadata
    blocks = metadata.kv_blocks
    cells = pad_cells(context) if blocks is None else -(-context // blocks.size) * blocks.size
    band = calibration.band_for(context, num_batch, num_parallel)
    breakdown = metadata.breakdown_gb
    units = cells / TOKENS_PER_UNIT
    weights = fixed_cache = context_cache = compute = overhead = None
    if breakdown.weights is None or band.fixed_cache_gb is None:
        measured = metadata.settings.num_parallel
        if num_parallel != measured:
            raise UnknownVerdictError(
                f"{PARTS_UNKNOWN}, so from what {measured} took it does not follow what {counted(num_parallel, 'slot')} take",
                hint=f"calibrate with --num-parallel {num_parallel}",
                code="parts-unknown",
            )
        total = from_gib(band.base_vram_gb + units * num_parallel * band.kv_cache_gb_per_10k)
    else:
        weights = from_gib(breakdown.weights)
        beyond_log = breakdown.overhead if band.overhead_gb is None else band.overhead_gb
        growth = band.overhead_gb_per_10k or 0.0
        of_slot = (band.slot_overhead_gb or 0.0) + units * (band.slot_overhead_gb_per_10k or 0.0)
        more = (num_parallel - metadata.settings.num_parallel) * of_slot
        overhead = None if beyond_log is None else from_gib(beyond_log + units * growth + more)
        compute_start = band.base_vram_gb - breakdown.weights - (beyond_log or 0.0) - band.fixed_cache_gb
        fixed_cache = from_gib(num_parallel * band.fixed_cache_gb)
        context_cache = from_gib(units * num_parallel * band.kv_cache_gb_per_10k)
        scored = units
        if metadata.settings.flash_attention == "disabled":
            scored = max(cells, LEAST_SCORES) / TOKENS_PER_UNIT
        compute = from_gib(compute_start + scored * band.compute_gb_per_10k - units * growth)
        total = weights + (overhead or 0) + fixed_cache + context_cache + compute
    within = context <= metadata.quality.valid_to
    warnings: list[str] = []
    if not within:
        reach = f"{metadata.quality.valid_to:,}, the range of this calibration"
        warnings.append(f"context {context:,} is beyond {reach}: extrapolated")
    if band.num_batch is not None and cells < band.num_batch:
        warnings.append(f"context {context:,} is below the physical batch of {band.num_batch:,}: an upper bound")
    at_most = is_bound(calibration, context)
    if blocks is not None and at_most:
        full = metadata.quality.valid_to if blocks.bound else blocks.size
        warnings.append(f"an upper bound: the log says what a sequence of {full:,} tokens takes, and not of fewer")
    if weights is None:
        warnings.append(PARTS_UNKNOWN)
    elif overhead is None:
        warnings.append("logged, not measured: the driver's own memory is not included")
    return Prediction(
        context=context,
        num_parallel=num_parallel,
        total_bytes=total,
        weights_bytes=weights,
        fixed_cache_bytes=fixed_cache,
        context_cache_bytes=context_cache,
        compute_bytes=compute,
        overhead_bytes=overhead,
        within_range=within,
        num_batch=band.num_batch,
        uncertainty_bytes=_interval(calibration, band, cells, total, num_parallel),
        speed=predict_speed(calibration, context),
        warnings=tuple(warnings),
        at_most=at_most,
    )


def _interval(calibration: Calibration, band: Band, cells: int, total: int, num_parallel: int) -> int:
    """Half the width of the prediction interval, bytes.

    Between the loads of a batch it is the error of the worst load when it is left out. Beyond them it grows with the distance
    from the nearest load in units of the stretch that the loads span, as the error of a line's slope does. Of one load, or
    where no error was measured, :data:`UNMEASURED_ERROR` stands for it. The overhead has a bound of its own: how far it
    differs between loads. Another number of slots has one more: where the bookkeeping of their cells is known (on the host,
    40 to 52 bytes a cell: :data:`harness.fit.growth.CELL_BYTES`), what the overhead grows by beside it may go with the slots,
    and each has some heap, within one reading (embedded b11549, two models: 50 to 120 KiB a slot). Elsewhere all that it
    grows by, or may grow by unseen, may go with them. Compute buffers hold copies of recurrent state, of each slot at most
    one (qwen3next, b11434: 5.0 MiB for three more slots of 4.7 MiB). Compute buffers that the loads show on a curve may leave
    the line with the square of the distance. With an f32 cache flash attention reads f16 copies of a layer's keys and values,
    which are hidden below other buffers up to some context (embedded llama.cpp b11434, two models). Where the engine has
    planned compute there is neither up to the end of the range: its lines are exact but for ``compute_doubt_gb``.
    A shorter context takes no more than a longer one, so that below the loads the upper end is that of the shortest. Without
    flash attention that is not so (software Vulkan: compute buffers of 64.0 MiB at 2 048 tokens and 32.5 at 8 192).
    """
    quality = calibration.metadata.quality
    loads = [load for load in quality.loads if load.num_batch == band.num_batch] or list(quality.loads)
    contexts = [load.context for load in loads]
    low, high = (min(contexts), max(contexts)) if contexts else (cells, cells)
    error = UNMEASURED_ERROR if quality.max_error is None else quality.max_error
    largest = from_gib(max((load.total_gb for load in loads), default=0.0))
    reading = READING_ERROR.get(calibration.metadata.machine.meter, MIB)
    away = max(cells - pad_cells(high), low - cells, 0)
    times = 1 + away / max(high - low, CELL_PADDING)
    spread = from_gib(quality.overhead_spread_gb or 0.0)
    slots = abs(num_parallel - calibration.metadata.settings.num_parallel)
    growth = band.overhead_gb_per_10k or 0.0
    if band.slot_overhead_gb_per_10k is None:
        unseen = from_gib(growth) / TOKENS_PER_UNIT
        hidden = (spread + 2 * reading) / max(high - low, CELL_PADDING)  # growth that the loads could not show
        grown = round(slots * cells * max(unseen, hidden))
    else:
        beside = max(growth - calibration.metadata.settings.num_parallel * band.slot_overhead_gb_per_10k, 0.0)
        grown = round(slots * (reading + cells * from_gib(beside) / TOKENS_PER_UNIT))
    copied = from_gib(_copies_gb(calibration, band)) / TOKENS_PER_UNIT
    grown += slots * (from_gib(band.recurrent_gb or 0.0) + round(copied * cells))
    away_from = (cells - low) * (cells - high) if away else 0
    curve = from_gib((band.curve_gb_per_10k2 or 0.0) * away_from / TOKENS_PER_UNIT**2)
    planned = band.compute_doubt_gb is not None
    curve += round(copied * max(cells - pad_cells(band.up_to if planned else high), 0)) + from_gib(band.compute_doubt_gb or 0.0)
    width = round(max(error * total, (max(error * largest, spread) + reading) * times)) + grown + curve
    if cells >= low or planned or calibration.metadata.settings.flash_attention == "disabled":
        return width
    rise = (low - cells) / TOKENS_PER_UNIT * (num_parallel * band.kv_cache_gb_per_10k + band.compute_gb_per_10k)
    at_low = total + from_gib(rise)
    doubt = max(error * at_low, max(error * largest, spread) + reading) + grown * low / cells
    return min(width, at_low + round(doubt) - total)


def is_cast(calibration: Calibration) -> bool:
    """Whether the graph holds f16 copies of a layer's keys and values, of all slots: an f32 cache with flash attention.

    llama.cpp ``llm_graph_context::build_attn_mha`` (src/llama-graph.cpp) casts them for ``ggml_flash_attn_ext``.
    """
    settings = calibration.metadata.settings
    return "f32" in settings.kv_cache_type and settings.flash_attention != "disabled"


def _copies_gb(calibration: Calibration, band: Band) -> float:
    """GiB per 10 000 tokens of f16 copies of one layer's f32 keys and values; 0 where none are made.

    Where it is not known which layers attend to everything, one of a model with other layers may have all.
    """
    metadata = calibration.metadata
    if not is_cast(calibration):
        return 0.0
    kinds = metadata.placement.layer_kinds
    attending = sum(kind in "fb" for kind in kinds or "") or (1 if band.fixed_cache_gb else metadata.model.layers or 1)
    return band.kv_cache_gb_per_10k / 2 / attending


def predict_speed(calibration: Calibration, depth: int) -> SpeedPrediction:
    """Speeds with everything on the target; decode at ``depth`` by a straight line of the time per token."""
    performance = calibration.metadata.performance.bounded
    return SpeedPrediction(
        prompt_tokens_per_s=performance.prompt_tokens_per_s,
        decode_tokens_per_s=performance.decode_tokens_per_s,
        decode_at_depth_tokens_per_s=decode_at_depth(calibration, depth),
        host_decode_tokens_per_s=performance.host_decode_tokens_per_s,
        uncertainty=performance.uncertainty,
    )


def decode_at_depth(calibration: Calibration, depth: int) -> float | None:
    """Decode tokens per second with ``depth`` tokens in the cache; ``None`` with fewer than two measured depths.

    Time per token grows with the cells that attention reads, so times, not speeds, are interpolated.
    """
    depths = calibration.metadata.performance.bounded.depths
    if len(depths) < 2:
        return None
    first, last = depths[0], depths[-1]
    if last.depth == first.depth:
        return None
    near, far = 1 / first.decode_tokens_per_s, 1 / last.decode_tokens_per_s
    slower = max(far - near, 0.0)  # a busy machine can time the deeper one as the faster; no cache makes it so
    seconds = near + slower * (depth - first.depth) / (last.depth - first.depth)
    return round(1 / max(seconds, near / 2), 2)
