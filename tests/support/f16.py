"""The weights of a GGUF as F16, for a device whose quantised kernels this CPU cannot run."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock

from tests.support.rpc import quantised_obstacle

if TYPE_CHECKING:
    from collections.abc import Iterator

_F16: Final = 1
_ALIGNMENT: Final = 32


def rpc_weights(path: Path) -> Path:
    """Weights that an rpc device can multiply here: the file itself, or its F16 copy."""
    return path if quantised_obstacle() is None else f16_of(path)


def f16_of(path: Path) -> Path:
    """The same weights as F16, in a file beside it that is written once."""
    copy = path.with_name(f"{path.stem}.f16.gguf")
    with FileLock(copy.with_suffix(".lock")):
        if not copy.is_file():
            write_f16(path, copy)
    return copy


def write_f16(source: Path, target: Path) -> None:
    """Write a GGUF with every quantised tensor as F16; metadata is copied byte for byte, but for the file type.

    The result depends on the source alone, so that its digest can be compared.
    """
    import numpy
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    reader: Any = GGUFReader(source)
    exact = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}

    def contents(tensor: Any) -> bytes:
        if tensor.tensor_type in exact:
            return bytes(tensor.data.tobytes())
        return bytes(dequantize(tensor.data, tensor.tensor_type).astype(numpy.float16).tobytes())

    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as out:
            infos, sizes = [], []
            for tensor in reader.tensors:
                kept = tensor.tensor_type in exact
                width = 4 if tensor.tensor_type == GGMLQuantizationType.F32 else 2
                sizes.append(int(tensor.n_elements) * width)
                infos.append((tensor.name, [int(n) for n in tensor.shape], int(tensor.tensor_type) if kept else _F16))
            out.write(_metadata(source, reader))
            out.write(b"".join(_infos(infos, sizes)))
            for tensor, size in zip(reader.tensors, sizes, strict=True):
                out.write(b"\0" * (-out.tell() % _ALIGNMENT))
                data = contents(tensor)
                if len(data) != size:
                    raise OSError(0, f"tensor {tensor.name} has an unexpected size")
                out.write(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _metadata(source: Path, reader: Any) -> bytes:
    """The header up to the tensors, byte for byte, with ``general.file_type`` set to F16."""
    first = min(int(tensor.field.offset) for tensor in reader.tensors)
    with source.open("rb") as file:
        data = bytearray(file.read(first))
    kind = reader.fields.get("general.file_type")
    if kind is not None:
        value = int(kind.offset) + sum(part.nbytes for part in kind.parts[:-1])
        data[value : value + 4] = struct.pack("<I", _F16)
    return bytes(data)


def _infos(infos: list[tuple[str, list[int], int]], sizes: list[int]) -> Iterator[bytes]:
    offset = 0
    for (name, shape, kind), size in zip(infos, sizes, strict=True):
        encoded = name.encode()
        yield struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        yield struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
