"""Names of Ollama's models, and the folders that keep them (types/model/name.go, server/modelpath.go of ollama/ollama)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from harness.errors import BadInputError, NotFoundError

#: The name under which a GGUF of the user's is loaded.
LOCAL: Final = "harness-local"
_PART: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
# types/model/name.go: [host[:port]/][namespace/]model[:tag]; the digest behind it is ours, Ollama has none.
_HOST: Final = rf"{_PART}(?::\d{{1,5}})?"
_NAME: Final = re.compile(
    rf"(?:(?P<plain>http)://(?={_HOST}/{_PART}/))?"
    rf"(?P<name>(?:(?:{_HOST}/)?{_PART}/)?{_PART}(?::(?P<tag>{_PART}))?)(?:@(?P<digest>sha256:[0-9a-f]{{8,64}}))?",
    re.ASCII,
)


def split_name(text: str) -> tuple[str, str | None]:
    """Ollama's own name of a model, and the digest that it is pinned to, if any.

    Raises:
        NotFoundError: Ollama could not know such a name (code ``no-such-model``), or it runs elsewhere (``cloud-model``).
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise NotFoundError(
            f"{text!r} is not a valid Ollama model name",
            hint="a name like qwen2.5:0.5b or hf.co/USER/REPO:Q4_K_M, or the path of a .gguf file",
            code="no-such-model",
        )
    tag = match["tag"] or ""
    if tag == "cloud" or tag.endswith("-cloud"):
        raise NotFoundError(
            f"{text} runs in Ollama's cloud: nothing of it is loaded here, so there is no memory to measure",
            hint="choose a tag without cloud",
            code="cloud-model",
        )
    return match["name"], match["digest"]


def over_plain_http(text: str) -> bool:
    """Whether a name asks for its registry without TLS: ``http://HOST[:PORT]/NAMESPACE/MODEL``."""
    match = _NAME.fullmatch(text)
    return match is not None and match["plain"] is not None


def place_of(name: str) -> tuple[str, str, str, str]:
    """Registry, namespace, model and tag of a name (types/model/name.go)."""
    rest, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "latest")
    parts = rest.split("/")
    host = parts[0] if len(parts) == 3 else "registry.ollama.ai"
    return host, parts[-2] if len(parts) > 1 else "library", parts[-1], tag


def manifest(folder: Path, name: str) -> Path:
    """Where a models folder keeps the manifest of a model (server/modelpath.go)."""
    return folder.joinpath("manifests", *place_of(name))


def digests(text: bytes) -> list[str]:
    """The blobs that a manifest names.

    Raises:
        BadInputError: it is none.
    """
    try:
        body = json.loads(text)
        found = [body.get("config") or {}, *body["layers"]]
        return [one["digest"] for one in found if one.get("digest")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError("a manifest of Ollama's was not understood", code="bad-manifest") from error


def blob_name(digest: str) -> str:
    """What a models folder calls a blob.

    Raises:
        BadInputError: it is no digest.
    """
    if not re.fullmatch(r"sha256[:-][0-9a-f]{64}", digest):
        raise BadInputError(f"a manifest of Ollama's names an invalid blob: {digest[:80]!r}", code="bad-manifest")
    return digest.replace(":", "-")


def stored_digest(folder: Path, name: str) -> str | None:
    """The digest of a model's weights in a models folder, from its manifest; ``None`` where it is not there.

    Raises:
        NotFoundError: Ollama could not know such a name. OSError: the folder may not be read.
    """
    try:
        text = manifest(folder, split_name(name)[0]).read_text()
    except FileNotFoundError:
        return None
    try:
        layers = json.loads(text)["layers"]
        found = [layer["digest"] for layer in layers if layer["mediaType"] == "application/vnd.ollama.image.model"]
    except (ValueError, KeyError, TypeError):
        return None
    return found[0] if len(found) == 1 else None


def models_folder(text: str) -> Path | None:
    """``--models`` as a folder of this machine that holds Ollama's ``manifests`` and ``blobs``; ``None``: a volume's name.

    Raises:
        NotFoundError: there is no such folder, or no models of Ollama's in it.
    """
    path = Path(text).expanduser()
    for folder in (path, path / "models"):
        if (folder / "manifests").is_dir():
            return folder.resolve()
    if "/" not in text and not text.startswith((".", "~")):
        return None
    raise NotFoundError(
        f"{path} holds no models of Ollama's" if path.is_dir() else f"there is no folder {path}",
        hint="--models takes Ollama's own folder (~/.ollama), or the name of a Docker volume with one",
        code="no-models",
    )


def local_name(digest: str) -> str:
    """The name under which a GGUF of the user's is loaded."""
    return f"{LOCAL}:{digest.removeprefix('sha256:')[:12]}"


def is_closed(folder: Path, name: str) -> bool:
    """Whether a folder has a model that root without any privilege may not read."""
    return manifest(folder, name).is_file() and not root_may_read(folder, name)


def root_may_read(folder: Path, name: str) -> bool:
    """Whether root without any privilege (``CapDrop: ALL``) may read a model of a folder: as the owner, or as anyone."""
    path = manifest(folder, name)
    try:
        blobs = [folder / "blobs" / blob_name(digest) for digest in digests(path.read_bytes())]
        within = [*path.parents, *folder.glob("blobs")]
        return all(_root_may(one) for one in (path, *blobs, *(one for one in within if one.is_relative_to(folder))))
    except (OSError, BadInputError):
        return False


def _root_may(path: Path) -> bool:
    if path.is_symlink():
        return False  # where it leads is not there
    found = path.stat()
    shift = 6 if found.st_uid == 0 else 3 if found.st_gid == 0 else 0
    needed = 0o5 if path.is_dir() else 0o4
    return found.st_mode >> shift & needed == needed
