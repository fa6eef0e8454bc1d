"""The header of a GGUF file: what a model is, and how many bytes each layer's tensors take.

Format: ggml/docs/gguf.md of llama.cpp (versions 2 and 3, little-endian). Only the header is read; big arrays (the tokenizer)
are skipped.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from harness.errors import BadInputError, NotFoundError, NotPermittedError
from harness.files import AT_ONCE, PLAIN
from harness.model.record import Estimate, Model, Tensors
from harness.text import one_line

_MAGIC: Final = b"GGUF"
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9
#: What no sane file goes beyond: bytes of a text and of a name, entries of an array, fields, tensors, bytes of a header,
#: alignment; layers, tokens and heads of a model.
_MAX_STRING: Final = 1 << 24
_MAX_NAME: Final = 1 << 16
_MAX_COUNT: Final = 1 << 22
_MAX_FIELDS: Final = 1 << 14
_MAX_TENSORS: Final = 1 << 17
_MAX_HEADER: Final = 1 << 30
_MAX_ALIGNMENT: Final = 1 << 20
MAX_LAYERS: Final = 1 << 14
MAX_TOKENS: Final = 1 << 31
MAX_WIDTH: Final = 1 << 24
MAX_PARTS: Final = 512
_KEPT_ARRAY: Final = 4096
_MAX_DIMENSIONS: Final = 8
_BLOCK: Final = re.compile(r"blk\.(\d{1,5})\.", re.ASCII)
_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
#: ``general.file_type`` (llama.h, ``enum llama_ftype``).
_FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip
#: Elements and bytes of a block, by tensor type (ggml.h, ``enum ggml_type``; ggml.c, ``type_traits``).
BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


#: What the name of a file holds that has a header and no weights (:mod:`harness.headers.holes`).
HEADER_ONLY: Final = ".header-only"


def is_header_only(path: str | Path) -> bool:
    """Whether a file has no weights, by its name."""
    return HEADER_ONLY in Path(path).name


def refuse_header_only(path: str | Path) -> None:
    """Refuse to load a model without its weights as if it were one.

    Raises:
        NotFoundError: it has none.
    """
    if is_header_only(path):
        raise NotFoundError(
            f"{Path(path).name} is a header without weights: memory is measured with it, and nothing can be asked of it",
            hint="download the model and give its path; or measure it by its own name with --header-only",
            code="header-only",
        )


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of a GGUF, and its tensors as (name, bytes). The tensors' data begins at ``begin``, bytes from the start."""

    metadata: dict[str, Any]
    tensors: tuple[tuple[str, int], ...]
    begin: int = 0

    def field(self, key: str) -> Any:
        """``<architecture>.<key>``, or ``None``."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")

    @property
    def parts(self) -> int:
        """Files that the model is split into (``split.count``, llama.cpp tools/gguf-split); 1 where it is whole."""
        count = self.metadata.get("split.count")
        return count if isinstance(count, int) and 0 < count <= MAX_PARTS else 1


class Stream(Protocol):
    """Bytes that are read from front to back: a file, or one that is somewhere else."""

    def read(self, count: int, /) -> bytes:
        """So many bytes; fewer at the end."""

    def seek(self, count: int, whence: int, /) -> int:
        """Skip bytes (``whence`` 1)."""

    def tell(self) -> int:
        """Bytes that were read or skipped."""


class _Reader:
    """Reads little-endian values, refusing what no sane file holds."""

    def __init__(self, file: Stream, size: int, most: int = _MAX_HEADER) -> None:
        self.file, self.size, self.most = file, size, most

    def take(self, count: int) -> bytes:
        if self.file.tell() > self.most:
            raise ValueError("its header has no end")
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def skip(self, count: int) -> None:
        if self.file.tell() + count > min(self.size, self.most):
            raise EOFError if self.size <= self.most else ValueError("its header has no end")
        self.file.seek(count, 1)

    def text(self, longest: int = _MAX_STRING) -> str:
        length = self.scalar("<Q")
        if length > longest:
            raise ValueError("a string is too long")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        return self.scalar(_SCALARS[kind])

    def array(self) -> Any:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if count > _MAX_COUNT:
            raise ValueError("an array is too long")
        if kind == _STRING:
            for _ in range(count):
                length = self.scalar("<Q")
                if length > _MAX_STRING:
                    raise ValueError("a string is too long")
                self.skip(length)
            return None
        if kind == _ARRAY:
            raise ValueError("nested arrays")
        width = struct.calcsize(_SCALARS[kind])
        if count > _KEPT_ARRAY:
            self.skip(width * count)
            return None
        return [self.scalar(_SCALARS[kind]) for _ in range(count)]


def read_header(path: Path) -> Header:
    """Read a GGUF's header and check that the file is as long as its tensors need.

    Raises:
        NotFoundError: no such file. NotPermittedError: not readable.
        BadInputError: not a GGUF, an unknown version, or truncated.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | AT_ONCE | PLAIN), "rb") as file:
            return read_stream(file, _plain_size(file.fileno(), path), str(path))
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {path}", code="no-such-file") from error
    except IsADirectoryError as error:
        raise BadInputError(f"{path} is a folder, not a GGUF file", code="not-gguf") from error
    except PermissionError as error:
        raise NotPermittedError(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise BadInputError(f"{path} is damaged: {error}", code="bad-gguf") from error


def read_stream(file: Stream, size: int, name: str, most: int = _MAX_HEADER) -> Header:
    """Read the header of a GGUF of ``size`` bytes; ``most`` is what a header may take of them.

    Raises:
        BadInputError: not a GGUF, an unknown version, truncated, or nothing that a sane file holds. OSError: of the stream.
    """
    try:
        return _read(_Reader(file, size, most), name)
    except EOFError as error:
        raise BadInputError(f"{name} is truncated: its header ends early", code="truncated-gguf") from error
    except (ValueError, KeyError, OverflowError) as error:
        raise BadInputError(f"{name} is damaged: {error}", code="bad-gguf") from error


def _plain_size(descriptor: int, path: Path) -> int:
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder, not a GGUF file" if stat.S_ISDIR(state.st_mode) else "no plain file"
        raise BadInputError(f"{path} is {kind}", code="not-gguf")
    return state.st_size


def _read(reader: _Reader, path: str) -> Header:
    if reader.file.read(4) != _MAGIC:
        raise BadInputError(f"{path} is not a GGUF file", code="not-gguf")
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise BadInputError(f"{path} is GGUF version {version}; 2 and 3 can be read", code="bad-gguf")
    tensor_count, field_count = reader.scalar("<Q"), reader.scalar("<Q")
    if tensor_count > _MAX_TENSORS or field_count > _MAX_FIELDS:
        raise ValueError("absurd counts")
    if tensor_count == 0:
        raise ValueError("it holds no tensors")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = reader.text(_MAX_NAME)
        if not key or key in metadata:
            raise ValueError(f"a field is nameless or stands twice: {key[:60]!r}")
        metadata[key] = reader.value(reader.scalar("<I"))
    starts: list[tuple[int, str]] = []
    needed = 0
    for _ in range(tensor_count):
        name = reader.text(_MAX_NAME)
        dimensions = reader.scalar("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name[:60]!r} has {dimensions} dimensions")
        elements = math.prod(struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions)))
        block, width = BLOCKS.get(reader.scalar("<I"), (1, 0))  # of a type that is new, only the start is checked
        start = reader.scalar("<Q")
        needed = max(needed, start + elements // block * width)
        starts.append((start, name))
    _check(metadata)
    alignment = metadata.get("general.alignment", 32)
    data = -(-reader.file.tell() // alignment) * alignment
    if data + max([needed, *(start + 1 for start, _ in starts)]) > reader.size:
        raise BadInputError(f"{path} is truncated: its tensors end beyond the file", code="truncated-gguf")
    starts.sort()
    ends = [start for start, _ in starts[1:]] + [reader.size - data]
    tensors = tuple((name, end - start) for (start, name), end in zip(starts, ends, strict=True))
    return Header(metadata=metadata, tensors=tensors, begin=data)


def _check(metadata: dict[str, Any]) -> None:
    """Refuse fields that are not what they must be: everything that is derived from a header rests on these."""
    architecture = metadata.get("general.architecture")
    if architecture is not None and not (isinstance(architecture, str) and _ARCHITECTURE.fullmatch(architecture)):
        raise ValueError("general.architecture is no name")
    alignment = metadata.get("general.alignment", 32)
    if not is_count(alignment, _MAX_ALIGNMENT) or alignment % 8:
        raise ValueError("general.alignment is no alignment")
    limits = {"context_length": MAX_TOKENS, "block_count": MAX_LAYERS, "embedding_length": MAX_WIDTH}
    for key, largest in limits.items():
        value = metadata.get(f"{architecture}.{key}")
        if value is not None and not is_count(value, largest):
            raise ValueError(f"{architecture}.{key} is no number that a model can have")


def is_count(value: Any, largest: int) -> bool:
    """Whether a field is a number above zero, and no more than ``largest``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def name_in(header: Header) -> str | None:
    """The model's own name (``general.name``) with its quantisation, as files are named; ``None`` where it has none."""
    own = header.metadata.get("general.name")
    name = one_line(own, 100) if isinstance(own, str) else ""
    quantization = describe(header, name, None).quantization
    if name and quantization and quantization.lower() not in name.lower():
        name = f"{name}-{quantization}"
    return name.replace(" ", "-") or None


def describe(header: Header, name: str, digest: str | None) -> Model:
    """The model as the artifact names it."""
    file_type = header.metadata.get("general.file_type")
    return Model(
        name=name,
        digest=digest,
        architecture=header.metadata.get("general.architecture"),
        quantization=_FILE_TYPES.get(file_type) if isinstance(file_type, int) else None,
        train_context=header.field("context_length"),
        layers=header.field("block_count"),
    )


def tensor_bytes(header: Header) -> Tensors:
    """Bytes of the repeating layers, of their experts, and of what follows and precedes them."""
    layers: dict[int, int] = {}
    experts: dict[int, int] = {}
    output = embedding = 0
    for name, size in header.tensors:
        block = _BLOCK.match(name)
        if block is not None:
            index = int(block[1])
            layers[index] = layers.get(index, 0) + size
            if "_exps" in name:
                experts[index] = experts.get(index, 0) + size
        elif name.startswith("token_embd."):
            embedding = size
        elif name.startswith("output"):
            output += size
    if not any(name == "output.weight" for name, _ in header.tensors):
        output += embedding  # tied: the output matrix is a second use of the embeddings
    order = sorted(layers)
    return Tensors(
        layer_bytes=tuple(layers[index] for index in order),
        output_bytes=output,
        embedding_bytes=embedding,
        expert_bytes=tuple(experts.get(index, 0) for index in order) if experts else (),
        expert_use=_expert_use(header) if experts else None,
        width=header.field("embedding_length"),
    )


def _expert_use(header: Header) -> float | None:
    used, count = header.field("expert_used_count"), header.field("expert_count")
    return used / count if isinstance(used, int) and isinstance(count, int) and 0 < used <= count else None


def server_estimate(header: Header, size: int) -> Estimate | None:
    """What Ollama >= 0.30 estimates for this model (llm/llama_server.go, ``PredictServerVRAM``); ``None`` without its shape.

    Keys and values as F16 in every layer, with the smallest count of KV heads (1 where it is 0) and ``width / heads`` of the
    layer with most heads, whatever the model's own head size, KV type or window.
    """
    layers, width = header.field("block_count"), header.field("embedding_length")
    heads, kv_heads = numbers(header.field("attention.head_count")), numbers(header.field("attention.head_count_kv"))
    if layers is None or width is None or not heads or not max(heads):
        return None
    head = width // max(heads)
    return Estimate(file_bytes=size, cache_bytes_per_token=2 * layers * (min(kv_heads or heads) or 1) * head * 2)


def numbers(value: Any) -> list[int]:
    """A count for all layers or one for each, as a list."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if one == 0 or is_count(one, MAX_WIDTH)]


def sha256(path: Path) -> str:
    """``sha256:…`` of a file."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
