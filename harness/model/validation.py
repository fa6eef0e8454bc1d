"""An artifact's mappings, read: every field in its domain, and no two of them against each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from harness.errors import BadInputError, ConfigError
from harness.model.calibration import SCHEMA_VERSION, Calibration, MeasuredLoad
from harness.model.domains import unsound
from harness.units import TOKENS_PER_UNIT, gib

#: Figures that are the same, or the sum of a few, GiB: six decimals each.
_ROUNDED: Final = 2e-6
_SUMMED: Final = 1e-5
#: What torch says of a GPU's memory is a little less than what its driver says (24 GiB: 2 %), relative.
_OF_A_CARD: Final = 0.1
#: How far a load may lie above its own line, beside the known error: relative, and GiB (fits end with 5 at 1 %).
_OFF_LINE: Final = 0.02
_OFF_LINE_GB: Final = 0.016


def from_document(document: object, where: str = "artifact") -> Calibration:
    """Read an artifact's mappings.

    Raises:
        ConfigError: the schema is newer than this program.
        BadInputError: the document is not an artifact, with the path of the field; or it contradicts itself.
    """
    version = None
    if isinstance(document, dict) and isinstance(metadata := document.get("metadata"), dict):
        version = metadata.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ConfigError(
            f"{where}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this harness reads",
            hint="upgrade harness",
            code="newer-schema",
        )
    try:
        calibration = msgspec.convert(document, Calibration, strict=True)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{where} is not a calibration: {error}", code="bad-artifact") from error
    if (why := unsound(msgspec.to_builtins(calibration))) is not None:
        raise BadInputError(f"{where} is not a calibration: {why}", code="bad-artifact")
    if (why := next(_contradictions(calibration), None)) is not None:
        raise BadInputError(f"{where} contradicts itself: {why}", code="bad-artifact")
    return calibration


def _contradictions(calibration: Calibration) -> Iterator[str]:
    """What cannot be true at once, for people."""
    metadata = calibration.metadata
    last, quality = metadata.bands[-1], metadata.quality
    if calibration.id.partition("/")[0] != calibration.engine:
        yield f"its id is {calibration.id}, and its engine {calibration.engine}"
    for what, figure, other, same, rounding in _figures(calibration):
        if figure is not None and same is not None and abs(figure - same) > rounding:
            yield f"{what} is {figure:.10g}, and {other} {same:.10g}"
    for what, end in (("its last band ends at", last.up_to), ("the model was trained on", metadata.model.train_context)):
        if end is not None and quality.valid_to > end:
            yield f"valid_to is {quality.valid_to}, and {what} {end} tokens"
    for load in quality.loads:
        said = _line_at(calibration, load)
        allowed = _OFF_LINE_GB + (_OFF_LINE + (quality.max_error or 0.0)) * load.total_gb
        if said is not None and load.total_gb - said > allowed:
            yield f"{load.context:,} tokens took {load.total_gb} GiB, and its line says {said:.6f}"


def _figures(calibration: Calibration) -> Iterator[tuple[str, float | None, str, float | None, float]]:
    """Figures that stand twice, GiB: what each is, and by how much rounding may part them."""
    constants, metadata = calibration.constants, calibration.metadata
    last, parts, placement, blocks = metadata.bands[-1], metadata.breakdown_gb, metadata.placement, metadata.kv_blocks
    for name in ("base_vram_gb", "kv_cache_gb_per_10k", "compute_gb_per_10k"):
        yield name, getattr(constants, name), "in its last band", getattr(last, name), _ROUNDED
    yield "fixed_cache", parts.fixed_cache, "in its last band", last.fixed_cache_gb, _ROUNDED
    if parts.weights is not None and parts.fixed_cache is not None and parts.compute is not None:
        together = parts.weights + parts.fixed_cache + parts.compute + (parts.overhead or 0.0)
        yield "base_vram_gb", constants.base_vram_gb, "its parts together", together, _SUMMED
    machine = metadata.machine
    if machine.total_cuda_gb is not None and machine.gpus and (memory := machine.gpus[0].memory_gb) is not None:
        yield "total_cuda_gb", machine.total_cuda_gb, "memory_gb of the GPU", memory, _OF_A_CARD * memory
    if layers := (*placement.layers_gb, *placement.experts_gb):
        yield (
            "layer_weights_gb",
            placement.layer_weights_gb,
            "its layers together",
            sum(layers),
            _ROUNDED * len(layers) + _SUMMED,
        )
    if blocks is not None:
        slope = blocks.per_block * blocks.bytes / blocks.size * TOKENS_PER_UNIT
        yield "kv_cache_gb_per_10k", constants.kv_cache_gb_per_10k, "by its blocks", gib(slope), _ROUNDED
        yield "fixed_cache", parts.fixed_cache, "by its blocks", gib(blocks.fixed * blocks.bytes), _ROUNDED


def _line_at(calibration: Calibration, load: MeasuredLoad) -> float | None:
    """What the line of a load's band says that the load took, GiB.

    ``None`` where its batch has none, where vLLM fills a budget, and where scores of attention do not shrink further.
    """
    metadata, slots = calibration.metadata, calibration.metadata.settings.num_parallel
    band = calibration.band_for(load.context, load.num_batch)
    if metadata.settings.vllm is not None or load.num_batch != band.num_batch or load.context < 1024:
        return None
    cells, of_more_slots = load.context / TOKENS_PER_UNIT, (slots - 1) * (band.fixed_cache_gb or 0.0)
    return band.base_vram_gb + of_more_slots + cells * (slots * band.kv_cache_gb_per_10k + band.compute_gb_per_10k)
