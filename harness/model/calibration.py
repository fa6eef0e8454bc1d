"""The artifact: two constants that explain every context, and everything needed to trust them.

All ``_gb`` fields are GiB (2**30) with six decimals. The YAML file is this structure, field for field; the JSON schema in
``models/calibration.schema.json`` is generated from it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec

from harness.model.domains import (
    AcceptedError,
    Count,
    CountOrZero,
    Date,
    GrowthGb,
    MemoryGb,
    Name,
    Rate,
    RunName,
    Share,
    SizeGb,
    Tokens,
)
from harness.model.facts import EngineName
from harness.model.record import EngineVersion, HeaderSource, Machine, Model, Settings, Weights

SCHEMA_VERSION: Final = 1

#: What is said of a calibration whose parts are ``null``.
PARTS_UNKNOWN: Final = "parts unknown: this engine's log was not understood"
#: Speeds are not predicted to better than this, relative, and are not given where they may be off by more than that.
SPEED_UNCERTAINTY: Final = 0.15
MOST_UNCERTAINTY: Final = 0.30
#: What is noted of slots that share one cache: then the constants hold for their number alone.
SHARED_CACHE: Final = "the slots share one cache"


class Constants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The two constants (and the growth of compute buffers) of the band of the largest context; one slot."""

    base_vram_gb: SizeGb
    kv_cache_gb_per_10k: SizeGb
    compute_gb_per_10k: GrowthGb = 0.0


class Breakdown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What base is made of; the four parts sum to it exactly.

    ``overhead`` is ``null`` where only the log was read; all parts are where the log was not understood.
    """

    weights: SizeGb | None
    fixed_cache: SizeGb | None
    compute: GrowthGb | None
    overhead: GrowthGb | None
    budget: SizeGb | None = None


class Band(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The straight line that holds up to ``up_to`` tokens per slot, at physical batch ``num_batch``.

    ``overhead_gb`` is what the meter saw beyond the log at that batch, where it is another than the artifact's;
    ``overhead_gb_per_10k`` the part of ``compute_gb_per_10k`` by which it grows, absent where it is constant. Of both,
    ``slot_overhead_gb`` and ``slot_overhead_gb_per_10k`` are what each slot has: on the host, the bookkeeping of its cells.
    ``curve_gb_per_10k2`` is how far compute may leave the line beyond the loads, per product of the distances from the first
    and the last, absent where they show a line; ``compute_doubt_gb`` how far where the engine has planned it there.
    ``recurrent_gb`` is what of ``fixed_cache_gb`` is the state of recurrent layers.
    """

    up_to: Tokens
    num_batch: Tokens | None
    base_vram_gb: SizeGb
    kv_cache_gb_per_10k: SizeGb
    compute_gb_per_10k: GrowthGb
    fixed_cache_gb: SizeGb | None
    overhead_gb: GrowthGb | None = None
    overhead_gb_per_10k: SizeGb | None = None
    slot_overhead_gb: SizeGb | None = None
    slot_overhead_gb_per_10k: SizeGb | None = None
    curve_gb_per_10k2: SizeGb | None = None
    recurrent_gb: SizeGb | None = None
    compute_doubt_gb: SizeGb | None = None


class MeasuredLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One point of the fit; ``planned``: not made, but planned by the engine, with the overhead of the load that was."""

    context: Tokens
    num_batch: Tokens | None
    total_gb: MemoryGb
    planned: bool = False


class Quality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the constants may be trusted; ``max_error`` is relative, ``null`` where it was not measured.

    ``plan_error`` is how far the engine's plan of the one load of a quick run was off that load, relative.
    """

    loads: tuple[MeasuredLoad, ...]
    max_error: AcceptedError | None
    overhead_spread_gb: SizeGb | None
    valid_to: Tokens
    notes: tuple[str, ...] = ()
    plan_error: AcceptedError | None = None


class SplitCompute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Compute on the GPU when only ``layers`` layers (the output is one) or no experts are there, from the engine's dry run."""

    layers: CountOrZero
    context: Tokens
    compute_gb: SizeGb
    experts_on_host: bool = False


class SetCompute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Compute of each of several devices, from the engine's dry runs of one split at some contexts.

    ``layers`` of each device in the engine's order (the output is one); the last ``partial`` of them leave their experts to the
    host. ``compute_gb`` has a row for each of ``contexts``, a figure for each device.
    """

    layers: tuple[CountOrZero, ...]
    partial: tuple[CountOrZero, ...] = ()
    contexts: Annotated[tuple[Tokens, ...], msgspec.Meta(min_length=1)]
    compute_gb: tuple[tuple[SizeGb, ...], ...]


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

    reserve_gb: SizeGb | None
    layer_weights_gb: SizeGb | None
    output_weights_gb: SizeGb | None
    split_compute: tuple[SplitCompute, ...] = ()
    set_compute: tuple[SetCompute, ...] = ()
    layer_kinds: Annotated[str, msgspec.Meta(pattern="^[fwrb]+$")] | None = None
    layers_gb: tuple[SizeGb, ...] = ()
    experts_gb: tuple[SizeGb, ...] = ()
    expert_use: Share | None = None
    width: Tokens | None = None
    estimate_base_gb: SizeGb | None = None
    estimate_gb_per_10k: SizeGb | None = None
    start_gb: MemoryGb | None = None
    host_gb: SizeGb | None = None


class DepthSpeed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Decode speed with ``depth`` tokens already in the cache."""

    depth: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    decode_tokens_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Performance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Speeds under the engine's own defaults; ``null`` with the reason in the notes.

    ``spread`` is how far repeated timings of the decode speed lay apart, relative to their median, or on the host what other
    processes may have cost, if that is more; absent where neither is known.
    """

    load_s: Rate | None
    prompt_tokens_per_s: Rate | None
    decode_tokens_per_s: Rate | None
    host_decode_tokens_per_s: Rate | None
    depths: tuple[DepthSpeed, ...] = ()
    spread: Rate | None = None

    @property
    def uncertainty(self) -> float:
        """How far a speed may be off, relative: twice the spread of repeats, 15 % at least."""
        return max(SPEED_UNCERTAINTY, 2 * (self.spread or 0.0))

    @property
    def bounded(self) -> Performance:
        """The speeds whose bound says something: none above :data:`MOST_UNCERTAINTY`."""
        return self if self.uncertainty <= MOST_UNCERTAINTY else self.untimed

    @property
    def untimed(self) -> Performance:
        """The same without speeds: those of a setting that was not timed."""
        return msgspec.structs.replace(
            self, prompt_tokens_per_s=None, decode_tokens_per_s=None, host_decode_tokens_per_s=None, depths=()
        )  # fmt: skip


class KvBlocks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's KV cache: blocks of ``size`` tokens that take ``bytes`` on each GPU.

    A sequence takes ``fixed`` blocks whatever its length (window and recurrent state), and ``per_block`` for each ``size``
    tokens that it has begun: one, or one for each group of layers of a hybrid model. With ``bound`` no log named the blocks:
    a sequence takes at most that.
    """

    size: Tokens
    bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    per_block: Count = 1
    fixed: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0
    bound: bool = False

    def of_sequence(self, context: int) -> int:
        """Blocks of one sequence of ``context`` tokens."""
        return self.fixed + self.per_block * -(-context // self.size)


class Metadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the constants come from.

    ``weights`` is ``header`` where zeros stood for the weights: memory is the same, and speeds are not measured. ``source``
    is where that header was read.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1)]
    calibrated_at: Date
    model: Model
    engine: EngineVersion
    settings: Settings
    machine: Machine
    breakdown_gb: Breakdown
    bands: Annotated[tuple[Band, ...], msgspec.Meta(min_length=1)]
    quality: Quality
    placement: Placement
    performance: Performance
    run: RunName | None
    kv_blocks: KvBlocks | None = None
    weights: Weights = "full"
    source: HeaderSource | None = None

    @property
    def of_one_length(self) -> bool:
        """Whether vLLM's KV cache is known for sequences of one length alone, which bounds that of shorter ones."""
        blocks = self.kv_blocks
        return blocks is not None and blocks.fixed > 0 and blocks.size >= self.quality.valid_to

    @property
    def bounded(self) -> bool:
        """Whether vLLM's KV cache is known as a bound, below the full length."""
        return self.of_one_length or (self.kv_blocks is not None and self.kv_blocks.bound)


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one engine, measured. ``id`` is ``engine/name``."""

    id: Name
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
    if metadata.get("kv_blocks", {}).get("bound") is False:
        del metadata["kv_blocks"]["bound"]
    if metadata["model"]["stored_digest"] is None:
        del metadata["model"]["stored_digest"]
    if not metadata["engine"]["named"]:
        del metadata["engine"]["named"]
    return document


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the artifact."""
    from inspect import cleandoc

    schema = msgspec.json.schema(Calibration)
    for definition in schema["$defs"].values():  # Python 3.13 and later have no indent there
        definition["description"] = cleandoc(definition["description"])
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "harness calibration"}
