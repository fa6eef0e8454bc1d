"""The artifact: two constants that explain every context, and everything needed to trust them.

All ``_gb`` fields are GiB (2**30) with six decimals. The YAML file is this structure, field for field; the JSON schema in
``models/calibration.schema.json`` is generated from it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec

from harness.errors import BadInputError, ConfigError
from harness.model.facts import EngineName
from harness.model.record import EngineVersion, HeaderSource, Machine, Model, Settings, Weights

SCHEMA_VERSION: Final = 1
#: No figure of an artifact comes near it (bytes of a block, tokens, GiB).
_LARGEST: Final = 1e15

#: What is said of a calibration whose parts are ``null``.
PARTS_UNKNOWN: Final = "parts unknown: this engine's log was not understood"
#: Speeds are not predicted to better than this, relative, and are not given where they may be off by more than that.
SPEED_UNCERTAINTY: Final = 0.15
MOST_UNCERTAINTY: Final = 0.30
#: What is noted of slots that share one cache: then the constants hold for their number alone.
SHARED_CACHE: Final = "the slots share one cache"
#: Constants and the last band are the same figures, GiB.
_ROUNDED: Final = 2e-6
#: How far a load may lie above its own line, beside the known error: relative, and GiB (fits end with 5 at 1 %).
_OFF_LINE: Final = 0.02
_OFF_LINE_GB: Final = 0.016
#: What ends a line, moves a cursor or turns the direction of a text round (Unicode: Cc, line and paragraph ends, bidi).
_CONTROL: Final = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
#: A day, as records begin their times (ISO 8601): by it one calibration is newer than another.
_DATE: Final = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?:T|$)", re.ASCII)

Positive = Annotated[int, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]


class Constants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The two constants (and the growth of compute buffers) of the band of the largest context; one slot."""

    base_vram_gb: NonNegative
    kv_cache_gb_per_10k: NonNegative
    compute_gb_per_10k: float = 0.0


class Breakdown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What base is made of; the four parts sum to it exactly.

    ``overhead`` is ``null`` where only the log was read; all parts are where the log was not understood.
    """

    weights: float | None
    fixed_cache: float | None
    compute: float | None
    overhead: float | None
    budget: float | None = None


class Band(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The straight line that holds up to ``up_to`` tokens per slot, at physical batch ``num_batch``.

    ``overhead_gb`` is what the meter saw beyond the log at that batch, where it is another than the artifact's;
    ``overhead_gb_per_10k`` the part of ``compute_gb_per_10k`` by which it grows, absent where it is constant. Of both,
    ``slot_overhead_gb`` and ``slot_overhead_gb_per_10k`` are what each slot has: on the host, the bookkeeping of its cells.
    ``curve_gb_per_10k2`` is how far compute may leave the line beyond the loads, per product of the distances from the first
    and the last of them, absent where the loads show a line. ``recurrent_gb`` is the part of ``fixed_cache_gb`` that is the
    state of recurrent layers.
    """

    up_to: Positive
    num_batch: Positive | None
    base_vram_gb: NonNegative
    kv_cache_gb_per_10k: NonNegative
    compute_gb_per_10k: float
    fixed_cache_gb: NonNegative | None
    overhead_gb: float | None = None
    overhead_gb_per_10k: NonNegative | None = None
    slot_overhead_gb: NonNegative | None = None
    slot_overhead_gb_per_10k: NonNegative | None = None
    curve_gb_per_10k2: NonNegative | None = None
    recurrent_gb: NonNegative | None = None


class MeasuredLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One point of the fit; ``planned``: not made, but planned by the engine, with the overhead of the load that was."""

    context: Positive
    num_batch: int | None
    total_gb: NonNegative
    planned: bool = False


class Quality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the constants may be trusted; ``max_error`` is relative, ``null`` where it was not measured.

    ``plan_error`` is how far the engine's plan of the one load of a quick run was off that load, relative.
    """

    loads: tuple[MeasuredLoad, ...]
    max_error: NonNegative | None
    overhead_spread_gb: NonNegative | None
    valid_to: Positive
    notes: tuple[str, ...] = ()
    plan_error: NonNegative | None = None


class SplitCompute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Compute on the GPU when only ``layers`` layers (the output is one) or no experts are there, from the engine's dry run."""

    layers: Annotated[int, msgspec.Meta(ge=0)]
    context: Positive
    compute_gb: NonNegative
    experts_on_host: bool = False


class SetCompute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Compute of each of several devices, from the engine's dry runs of one split at some contexts.

    ``layers`` of each device in the engine's order (the output is one); the last ``partial`` of them leave their experts to the
    host. ``compute_gb`` has a row for each of ``contexts``, a figure for each device.
    """

    layers: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    partial: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    contexts: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)]
    compute_gb: tuple[tuple[NonNegative, ...], ...]


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What decides which layers stay on the GPU. ``reserve_gb`` is what the engine keeps free.

    ``start_gb`` is what the engine has taken of the GPU, driver and all, when it reads what is free (llama.cpp): less than the
    overhead, which holds what kernels and their workspaces take later. ``host_gb`` is what the log names in host memory with
    everything on the GPU: input embeddings, pinned buffers.

    ``layer_kinds`` has one letter a layer: ``f`` attends to everything, ``w`` to a window, ``r`` is recurrent, ``b`` is both
    recurrent and attending. ``layers_gb`` are the weights of each layer without its experts, ``experts_gb`` those of its
    experts, of which a token goes through the share ``expert_use``. ``width`` is how many numbers each token is between two
    layers. ``estimate_*`` is what Ollama estimates (file and cache).
    """

    reserve_gb: NonNegative | None
    layer_weights_gb: NonNegative | None
    output_weights_gb: NonNegative | None
    split_compute: tuple[SplitCompute, ...] = ()
    set_compute: tuple[SetCompute, ...] = ()
    layer_kinds: Annotated[str, msgspec.Meta(pattern="^[fwrb]*$")] | None = None
    layers_gb: tuple[NonNegative, ...] = ()
    experts_gb: tuple[NonNegative, ...] = ()
    expert_use: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    width: Positive | None = None
    estimate_base_gb: NonNegative | None = None
    estimate_gb_per_10k: NonNegative | None = None
    start_gb: NonNegative | None = None
    host_gb: NonNegative | None = None


class DepthSpeed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Decode speed with ``depth`` tokens already in the cache."""

    depth: int
    decode_tokens_per_s: Annotated[float, msgspec.Meta(gt=0)]


class Performance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Speeds under the engine's own defaults; ``null`` with the reason in the notes.

    ``spread`` is how far repeated timings of the decode speed lay apart, relative to their median, or on the host what other
    processes may have cost, if that is more; absent where neither is known.
    """

    load_s: NonNegative | None
    prompt_tokens_per_s: NonNegative | None
    decode_tokens_per_s: NonNegative | None
    host_decode_tokens_per_s: NonNegative | None
    depths: tuple[DepthSpeed, ...] = ()
    spread: NonNegative | None = None

    @property
    def uncertainty(self) -> float:
        """How far a speed may be off, relative: twice the spread of repeats, 15 % at least."""
        return max(SPEED_UNCERTAINTY, 2 * (self.spread or 0.0))

    @property
    def bounded(self) -> Performance:
        """The speeds whose bound says something: none above :data:`MOST_UNCERTAINTY`."""
        if self.uncertainty <= MOST_UNCERTAINTY:
            return self
        return msgspec.structs.replace(
            self, prompt_tokens_per_s=None, decode_tokens_per_s=None, host_decode_tokens_per_s=None, depths=()
        )  # fmt: skip


class KvBlocks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's KV cache: blocks of ``size`` tokens that take ``bytes`` on each GPU.

    A sequence takes ``fixed`` blocks whatever its length (window and recurrent state), and ``per_block`` for each ``size``
    tokens that it has begun: one, or one for each group of layers of a hybrid model.
    """

    size: Positive
    bytes: Positive
    per_block: Positive = 1
    fixed: Annotated[int, msgspec.Meta(ge=0)] = 0

    def of_sequence(self, context: int) -> int:
        """Blocks of one sequence of ``context`` tokens."""
        return self.fixed + self.per_block * -(-context // self.size)


class Metadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the constants come from.

    ``weights`` is ``header`` where zeros stood for the weights: memory is the same, and speeds are not measured. ``source``
    is where that header was read.
    """

    schema_version: Positive
    calibrated_at: str
    model: Model
    engine: EngineVersion
    settings: Settings
    machine: Machine
    breakdown_gb: Breakdown
    bands: Annotated[tuple[Band, ...], msgspec.Meta(min_length=1)]
    quality: Quality
    placement: Placement
    performance: Performance
    run: str | None
    kv_blocks: KvBlocks | None = None
    weights: Weights = "full"
    source: HeaderSource | None = None

    @property
    def of_one_length(self) -> bool:
        """Whether vLLM's KV cache is known for sequences of one length alone, which bounds that of shorter ones."""
        blocks = self.kv_blocks
        return blocks is not None and blocks.fixed > 0 and blocks.size >= self.quality.valid_to


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one engine, measured. ``id`` is ``engine/name``."""

    id: str
    engine: EngineName
    constants: Constants
    metadata: Metadata

    def band_for(self, context: int, num_batch: int | None = None, num_parallel: int | None = None) -> Band:
        """The band whose line holds at ``context`` tokens per slot; beyond the last one, the last.

        An engine that chooses its batch goes by the tokens of all slots together, and bands are of the calibration's own
        number of slots (``num_parallel``: another number); ``num_batch`` takes the place of that choice.
        """
        bands, own = self.metadata.bands, self.metadata.settings.num_parallel
        if num_batch is None or all(band.num_batch != num_batch for band in bands):
            reached = context * (num_parallel or own) / own
            num_batch = next((band for band in bands if reached <= band.up_to), bands[-1]).num_batch
        alike = [band for band in bands if band.num_batch == num_batch]
        return next((band for band in alike if context <= band.up_to), alike[-1])


_SAFE: Final = re.compile(r"[A-Za-z0-9._-]")


def artifact_name(model: str) -> str:
    """The file name of a model's artifact, without folder and suffix.

    ``:`` becomes ``-`` and ``/`` ``--``; any other character outside ``[A-Za-z0-9._-]`` becomes ``%XX`` per UTF-8 byte. A
    name of dots alone is escaped whole, so that no name is a folder.
    """
    if set(model) <= {"."}:
        return "".join(f"%{byte:02X}" for byte in model.encode())
    parts: list[str] = []
    for character in model:
        if character == ":":
            parts.append("-")
        elif character == "/":
            parts.append("--")
        elif _SAFE.fullmatch(character):
            parts.append(character)
        else:
            parts.extend(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
    return "".join(parts)


def to_document(calibration: Calibration) -> dict[str, Any]:
    """The artifact as plain mappings, in file order, ready for YAML or JSON."""
    document: dict[str, Any] = msgspec.to_builtins(calibration)
    machine = document["metadata"]["machine"]
    if machine["total_cuda_gb"] is None:
        del machine["total_cuda_gb"]
    metadata = document["metadata"]
    for section, key in (
        (metadata, "kv_blocks"),
        (metadata, "source"),
        (metadata["settings"], "vllm"),
        (metadata["quality"], "plan_error"),
    ):
        if section[key] is None:
            del section[key]  # only vLLM has them, or a calibration from a header
    if metadata["model"]["stored_digest"] is None:
        del metadata["model"]["stored_digest"]
    if not metadata["engine"]["named"]:
        del metadata["engine"]["named"]
    return document


def from_document(document: object, where: str = "artifact") -> Calibration:
    """Read an artifact's mappings.

    Raises:
        ConfigError: the schema is newer than this program.
        BadInputError: the document is not an artifact.
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
    if not is_sane(msgspec.to_builtins(calibration)):
        raise BadInputError(
            f"{where} is not a calibration: a number is out of range, or a text contains control characters",
            code="bad-artifact",
        )
    if not _DATE.match(calibration.metadata.calibrated_at):
        raise BadInputError(f"{where} is not a calibration: calibrated_at is not a date", code="bad-artifact")
    last, constants = calibration.metadata.bands[-1], calibration.constants
    for name in ("base_vram_gb", "kv_cache_gb_per_10k", "compute_gb_per_10k"):
        if abs(getattr(constants, name) - getattr(last, name)) > _ROUNDED:
            raise BadInputError(
                f"{where} contradicts itself: {name} is {getattr(constants, name)}, and {getattr(last, name)} in its last band",
                code="bad-artifact",
            )
    quality, trained = calibration.metadata.quality, calibration.metadata.model.train_context
    valid_to = quality.valid_to
    for what, end in (("its last band ends at", last.up_to), ("the model was trained on", trained)):
        if end is not None and valid_to > end:
            raise BadInputError(
                f"{where} contradicts itself: valid_to is {valid_to}, and {what} {end} tokens", code="bad-artifact"
            )
    for load in calibration.metadata.quality.loads:
        said = _line_at(calibration, load)
        allowed = _OFF_LINE_GB + (_OFF_LINE + (quality.max_error or 0.0)) * load.total_gb
        if said is not None and load.total_gb - said > allowed:
            raise BadInputError(
                f"{where} contradicts itself: {load.context:,} tokens took {load.total_gb} GiB, and its line says {said:.6f}",
                code="bad-artifact",
            )
    return calibration


def _line_at(calibration: Calibration, load: MeasuredLoad) -> float | None:
    """What the line of a load's band says that the load took, GiB.

    ``None`` where its batch has none, where vLLM fills a budget, and where scores of attention do not shrink further.
    """
    metadata, slots = calibration.metadata, calibration.metadata.settings.num_parallel
    band = calibration.band_for(load.context, load.num_batch)
    if metadata.settings.vllm is not None or load.num_batch != band.num_batch or load.context < 1024:
        return None
    cells, of_more_slots = load.context / 10_000, (slots - 1) * (band.fixed_cache_gb or 0.0)
    return band.base_vram_gb + of_more_slots + cells * (slots * band.kv_cache_gb_per_10k + band.compute_gb_per_10k)


def is_sane(value: object, *, texts: bool = True) -> bool:
    """Whether every number can be calculated with, and no text has control characters: one line may not look like two.

    Without ``texts``, numbers alone are looked at.
    """
    if isinstance(value, dict):
        return all(is_sane(key, texts=texts) and is_sane(one, texts=texts) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(is_sane(one, texts=texts) for one in value)
    if isinstance(value, str):
        return not texts or not _CONTROL.search(value)
    return not isinstance(value, int | float) or abs(value) < _LARGEST


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the artifact."""
    from inspect import cleandoc

    schema = msgspec.json.schema(Calibration)
    for definition in schema["$defs"].values():  # Python 3.13 and later have no indent there
        definition["description"] = cleandoc(definition["description"])
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "harness calibration"}
