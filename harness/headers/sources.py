"""Where a model's header is read from: a file, an https URL, a repository of the Hugging Face Hub, or an engine's registry.

A source is found without reading it: :func:`find` answers with parts, sizes and digests as far as its index says them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import msgspec

from harness.engines.base import Layer
from harness.engines.gguf import MAX_PARTS
from harness.engines.registry import engine_names, remote_registry
from harness.errors import BadInputError, NotFoundError, UsageError
from harness.headers.ranges import check_url, fetch_small, open_client, shown
from harness.text import one_line

if TYPE_CHECKING:
    import httpx

_URL: Final = ("https://", "http://")
_HUB_FILE: Final = "hf://"
_HUB: Final = ("hf.co/", "huggingface.co/", "https://hf.co/", "https://huggingface.co/")
_PIECE: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPOSITORY: Final = re.compile(
    rf"(?P<repository>{_PIECE}/{_PIECE})(?:@(?P<revision>[A-Za-z0-9._/-]{{1,100}}?))?(?::(?P<quantization>[A-Za-z0-9._-]{{1,60}}))?/?"
)
_IN_REPOSITORY: Final = re.compile(
    rf"(?P<repository>{_PIECE}/{_PIECE})(?:@(?P<revision>[A-Za-z0-9._-]{{1,100}}))?/(?P<file>[^?#]{{1,400}}\.gguf)"
)
#: The name of a part of a split model (llama.cpp tools/gguf-split, ``llama_split_path``).
SPLIT: Final = re.compile(r"(?P<head>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model: at a ``url``, or at a ``path`` of this machine. ``headers`` are for the server of the URL alone."""

    name: str
    url: str | None = None
    path: Path | None = None
    size: int | None = None
    digest: str | None = None
    headers: Mapping[str, str] = {}


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A model at its source. ``name`` is what it is called here: an engine's own name, or the name of its file.

    ``layers`` are the other documents of an engine's registry, which a store of that engine needs; ``manifest`` its index.
    """

    source: str
    name: str
    parts: tuple[Part, ...]
    projector: Part | None = None
    quantization: str | None = None
    revision: str | None = None
    manifest: bytes | None = None
    layers: tuple[Layer, ...] = ()
    own_name: str = ""

    @property
    def digest(self) -> str | None:
        """Of the model: of its first part."""
        return self.parts[0].digest

    @property
    def size(self) -> int | None:
        """Bytes of all parts; ``None`` where the index does not say them."""
        sizes = [part.size for part in self.parts]
        return None if None in sizes else sum(filter(None, sizes))


def is_remote(name: str) -> bool:
    """Whether a name is the address of a source that is not on this machine."""
    return name.startswith((*_URL, _HUB_FILE, *_HUB))


def file_name(name: str) -> str:
    """The file of an address that names one; the name itself where it does not."""
    if name.startswith((*_URL, _HUB_FILE)) and name.endswith(".gguf"):
        return unquote(name).rpartition("/")[2]
    return name


def find(name: str, client: httpx.Client, engine: str | None = None) -> Found:
    """The model of a name; ``engine`` is the engine whose own registry is asked for names that are no address.

    Raises:
        NotFoundError: there is none. UsageError: an address that cannot be. Otherwise as of any request.
    """
    path = Path(name).expanduser()
    if path.is_file() or (name.endswith(".gguf") and not is_remote(name)):
        return _local(path)
    if name.startswith(_HUB_FILE):
        return _hub_file(name, name.removeprefix(_HUB_FILE))
    asks = None if engine is None else remote_registry(engine)
    if name.startswith(("hf.co/", "huggingface.co/")) and asks is not None:
        return _of_registry(name, client, engine)
    for prefix in _HUB:
        if name.startswith(prefix) and "/resolve/" not in name:
            return _hub_repository(name, name.removeprefix(prefix))
    if name.startswith(_URL):
        return _url(name)
    return _of_registry(name, client, engine)


def variants(name: str) -> tuple[Found, ...]:
    """Every quantisation of a repository, the smallest first; empty where a name is none, or names one of them.

    Raises:
        HarnessError: the repository cannot be read.
    """
    for prefix in _HUB:
        match = _REPOSITORY.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match is not None and match["quantization"] is None:
            from harness.headers.hub import models_of

            found = models_of(name, match["repository"], match["revision"])
            return tuple(sorted(found, key=lambda one: one.size or 0))
    return ()


def _local(path: Path) -> Found:
    split = SPLIT.fullmatch(path.name)
    paths = [path]
    if split is not None:
        paths = [path.with_name(one) for one in split_names(path.name)]
    missing = [one for one in paths if not one.is_file()]
    if missing:
        raise NotFoundError(f"no such file: {missing[0]}", code="no-such-file")
    parts = tuple(Part(name=one.name, path=one.resolve(), size=one.stat().st_size) for one in paths)
    return Found(source=str(path.resolve()), name=path.name, parts=parts)


def split_names(name: str) -> list[str]:
    """The names of all parts of a split model, from that of one; a name that is no part's stands for itself.

    Raises:
        BadInputError: it is a part of none.
    """
    match = SPLIT.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        raise BadInputError(f"{one_line(name)} is not a part of a split model", code="bad-split")
    return [f"{match['head']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]


def _url(name: str) -> Found:
    check_url(name)
    parts = urlsplit(name)
    last = unquote(parts.path).rpartition("/")[2]
    if not last.endswith(".gguf") or not last.isprintable():
        raise UsageError(f"{shown(name)} is not the address of a .gguf file", code="bad-url")
    before, _, after = name.partition("?")
    urls = [before.removesuffix(parts.path.rpartition("/")[2]) + one for one in split_names(parts.path.rpartition("/")[2])]
    query = f"?{after}" if after else ""
    return Found(
        source=shown(name),
        name=last,
        parts=tuple(Part(name=unquote(one).rpartition("/")[2], url=one + query) for one in urls),
    )


def _hub_file(name: str, rest: str) -> Found:
    match = _IN_REPOSITORY.fullmatch(rest)
    if match is None:
        raise UsageError(f"{one_line(name)} is not hf://OWNER/REPO/FILE.gguf", code="bad-url")
    from harness.headers.hub import models_of

    for one in models_of(name, match["repository"], match["revision"]):
        if match["file"] in [part.name for part in one.parts]:
            return msgspec.structs.replace(one, source=name)
    raise NotFoundError(f"there is no {match['file']} in {match['repository']}", code="no-such-model")


def _hub_repository(name: str, rest: str) -> Found:
    match = _REPOSITORY.fullmatch(rest)
    if match is None:
        raise UsageError(f"{one_line(name)} is not hf.co/OWNER/REPO[:QUANTISATION]", code="bad-url")
    from harness.headers.hub import models_of

    found = models_of(name, match["repository"], match["revision"])
    wanted = match["quantization"]
    # Without one it is Q4_K_M, as for Ollama (huggingface.co/docs/hub/ollama), else the only one there is.
    chosen = [one for one in found if (one.quantization or "").lower() == (wanted or "Q4_K_M").lower()]
    if not chosen and wanted is None and len(found) == 1:
        chosen = list(found)
    if not chosen:
        there = ", ".join(sorted({one.quantization or one.name for one in found}))
        raise NotFoundError(
            f"{match['repository']} has no {wanted or 'Q4_K_M'}", hint=f"there are: {there or 'no GGUF files'}",
            code="no-such-model",
        )  # fmt: skip
    return msgspec.structs.replace(chosen[0], source=name)


def _of_registry(name: str, client: httpx.Client, engine: str | None) -> Found:
    """A model of an engine's registry: the one asked for, else the first engine that has one."""
    registry = None if engine is None else remote_registry(engine)
    for one in engine_names() if registry is None else ():
        registry = registry or remote_registry(one)
    if registry is None:
        raise NotFoundError(f"{name!r} is neither a file nor an address", code="no-such-model")
    address = registry.manifest(name)
    try:
        text = fetch_small(client, address.url, address.headers)
    except NotFoundError as error:
        raise NotFoundError(
            f"the registry {urlsplit(address.url).hostname} has no model {name!r}", code="no-such-model",
            hint="a name of that registry, hf.co/OWNER/REPO:QUANTISATION, an https URL, or the path of a .gguf file",
        ) from error  # fmt: skip
    layers = registry.layers(name, text)
    models = [one for one in layers if one.kind == "model"]
    if not models:
        raise BadInputError(f"{name} is not a GGUF in its registry: there is no header to read", code="no-gguf")
    projectors = [one for one in layers if one.kind == "projector"]

    def part(layer: Layer) -> Part:
        return Part(name=name, url=layer.url, size=layer.size, digest=layer.digest)

    return Found(
        source=f"{urlsplit(address.url).hostname}: {name}",
        name=name,
        own_name=name,
        parts=tuple(part(one) for one in models[:1]),
        projector=part(projectors[0]) if projectors else None,
        manifest=text,
        layers=layers,
    )


__all__ = ["SPLIT", "Found", "Part", "file_name", "find", "is_remote", "open_client", "split_names", "variants"]
