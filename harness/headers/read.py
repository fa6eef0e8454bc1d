"""From a source to files that stand for the model: a header, and a hole as long as the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from harness.engines.base import HeaderOnly, Layer
from harness.engines.gguf import Header, describe, read_header, read_stream, server_estimate, tensor_bytes
from harness.errors import BadInputError
from harness.headers.holes import CacheEntry, Kept, entry, hole_name
from harness.headers.ranges import Ranges, fetch_small
from harness.headers.sources import Found, Part
from harness.model.calibration import artifact_name

if TYPE_CHECKING:
    import httpx

#: What a header of a model that is read over a network may take, bytes; those of large models take 5 to 25 MB.
LARGEST: Final = 128 << 20
#: The largest document beside the weights that is fetched whole, bytes, and of all of them together.
_DOCUMENT: Final = 1 << 20


@contextmanager
def header_only(found: Found, client: httpx.Client) -> Iterator[HeaderOnly]:
    """The sparse files of a model, for as long as the block runs; what of them is here already is not read again.

    Raises:
        HarnessError: the source cannot be read, is no model, or the disk cannot hold a hole of its size.
    """
    stem = artifact_name(found.name.removesuffix(".gguf"))[:120]
    with entry(stem, found.source) as place:
        paths, headers, kept = _parts(found, place, client)
        first = headers[0]
        if first.parts not in (1, len(found.parts)) or (first.parts > 1 and len(found.parts) == 1):
            raise BadInputError(
                f"{found.name} is one of {first.parts} parts; its source names {len(found.parts)}",
                hint="give the first part, named …-00001-of-….gguf",
                code="bad-split",
            )
        projector = None
        if found.projector is not None and found.manifest is not None:  # a store of an engine's needs it
            projector = _projector(found.projector, stem, place, client)
        documents = _documents(found.layers, place, client)
        tensors = tuple(one for header in headers for one in header.tensors)
        whole = msgspec.structs.replace(first, tensors=tensors)
        place.keep(kept)
        place.finish()
        yield HeaderOnly(
            name=found.name,
            source=found.source,
            folder=place.folder,
            parts=paths,
            model=describe(whole, found.name, found.digest),
            tensors=tensor_bytes(whole),
            header=whole,
            estimate=server_estimate(whole, sum(kept.sizes)),
            projector=projector,
            projector_digest=None if found.projector is None else found.projector.digest,
            revision=found.revision,
            manifest=found.manifest,
            own_name=found.own_name,
            documents=documents,
        )


def _parts(found: Found, place: CacheEntry, client: httpx.Client) -> tuple[tuple[Path, ...], list[Header], Kept]:
    stem, count, before = artifact_name(found.name.removesuffix(".gguf"))[:120], len(found.parts), place.kept
    if count > 1:
        stem = stem.rpartition("-of-")[0].rpartition("-")[0] or stem
    paths, headers, sizes, versions = [], [], [], []
    for number, part in enumerate(found.parts, 1):
        path = place.folder / hole_name(stem, number, count)
        known = None
        if before is not None and len(before.sizes) == count and part.path is None and path.is_file():
            known = before.sizes[number - 1], before.versions[number - 1]
        version: str | None = part.digest
        if known is not None and part.digest is not None and known == (part.size, part.digest):
            header, size = read_header(path), known[0]
        else:
            header, size, version, data = _header(part, client, place, number)
            place.write_hole(path.name, data, size)
        paths.append(path)
        headers.append(header)
        sizes.append(size)
        versions.append(part.digest or version)
    kept = Kept(source=found.source, digest=found.digest, revision=found.revision, sizes=tuple(sizes), versions=tuple(versions))
    return tuple(paths), headers, kept


def _header(
    part: Part, client: httpx.Client, place: CacheEntry | None = None, number: int = 0
) -> tuple[Header, int, str | None, bytes]:
    """The header of one part, the size of the part, its version at the source, and its first bytes."""
    if part.path is not None:
        header = read_header(part.path)
        size = part.path.stat().st_size
        with part.path.open("rb") as file:
            return header, size, None, file.read(header.begin)
    assert part.url is not None  # noqa: S101 - a part is at a path or at a URL
    begun, version = (b"", None) if place is None else place.begun(number)

    remote = Ranges(client, part.url, part.headers, begin=begun, version=version)
    try:
        header = _stream(remote, part)
    except BaseException:
        if place is not None:
            place.begin(number, remote.data, remote.version)
        raise
    return header, remote.open(), remote.version, bytes(remote.data[: header.begin])


def _stream(remote: Ranges, part: Part) -> Header:
    size = remote.open()
    if part.size is not None and part.size != size:
        raise BadInputError(f"{part.name} has {size} bytes, and its index says {part.size}", code="bad-source")
    header = read_stream(remote, size, part.name, LARGEST)
    remote.seek(max(header.begin - remote.tell(), 0))
    return header


def _projector(part: Part, stem: str, place: CacheEntry, client: httpx.Client) -> Path:
    path = place.folder / hole_name(f"{stem}.mmproj")
    known = part.digest is not None and part.size is not None and path.is_file() and path.stat().st_size == part.size
    if not known:
        _, size, _, data = _header(part, client, place, 0)
        place.write_hole(path.name, data, size)
    return path


def _documents(layers: tuple[Layer, ...], place: CacheEntry, client: httpx.Client) -> dict[str, Path]:
    """What stands beside the weights (configuration, template, parameters): small, and fetched whole, with its digest."""
    import hashlib

    found: dict[str, Path] = {}
    for layer in layers:
        if layer.kind != "document" or layer.size > _DOCUMENT or layer.digest in found:
            continue
        path = place.folder / layer.digest.replace(":", "-")
        if not path.is_file():
            data = fetch_small(client, layer.url, most=_DOCUMENT)
            if f"sha256:{hashlib.sha256(data).hexdigest()}" != layer.digest:
                raise BadInputError(f"a document of the registry is not {layer.digest[:19]}…", code="bad-source")
            path.write_bytes(data)
        found[layer.digest] = path
    return found
