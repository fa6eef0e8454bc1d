"""Ollama's models: their names, how they get into a running server, and what it says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from harness.engines import gguf
from harness.engines.base import Options, Progress, Source
from harness.engines.ollama.api import connected, pull_refusal, show, translated
from harness.engines.ollama.names import is_closed, local_name, models_folder, over_plain_http, split_name
from harness.engines.ollama.policy import CLOSED_FOLDER
from harness.errors import (
    BadInputError,
    CannotWriteError,
    EngineError,
    HarnessError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
)
from harness.model.record import Tensors
from harness.text import one_line

if TYPE_CHECKING:
    import httpx

#: A pull is tried this often; each try goes on where the last one ended.
PULL_ATTEMPTS: Final = 5
_BLOB: Final = re.compile(r"^FROM .*sha256[-:](?P<hex>[0-9a-f]{64})\s*$", re.MULTILINE)
#: Names of tensor types (fs/ggml/type.go) that ggml numbers (ggml.h).
_TYPES: Final = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "Q8_K": 15, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22,
    "IQ4_XS": 23, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "IQ1_M": 29, "BF16": 30, "MXFP4": 39,
}  # fmt: skip


def pull(client: httpx.Client, name: str, progress: Progress, *, plain: bool = False) -> None:
    """Pull a model, over ``plain`` http where that was asked for; a broken pull goes on where it ended, a few times.

    Raises:
        NotFoundError: there is no such model. CannotWriteError: no room. NotPermittedError: it is not for everyone.
        UnavailableError: its registry cannot be reached, or gives something else than it promised.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

    attempts = Retrying(
        retry=retry_if_exception_type(_BrokenPullError),
        stop=stop_after_attempt(PULL_ATTEMPTS),
        wait=wait_exponential(multiplier=0.1, max=15.0) + wait_random(0.0, 0.2),
        reraise=True,
    )
    attempts(_pull_once, client, name, progress, plain)


class _BrokenPullError(UnavailableError):
    """A pull that may go on."""


def _pull_once(client: httpx.Client, name: str, progress: Progress, plain: bool) -> None:
    """One request. Errors arrive inside an answer of status 200; only a last ``success`` says that all is well."""
    import ollama

    layers: dict[str, tuple[int, int]] = {}
    status = "nothing"
    try:
        with connected(client, f"pull {name}") as sdk:
            try:
                for event in sdk.pull(name, insecure=plain, stream=True):
                    status = event.status or status
                    if event.digest and event.total:
                        layers[event.digest] = (event.completed or 0, event.total)
                        done, total = (sum(column) for column in zip(*layers.values(), strict=True))
                        progress(f"pull {name}", done, total)
                    else:
                        progress(f"pull {name}: {one_line(status)}", 0, None)
            except ollama.ResponseError as error:
                raise _broken(name, error.error) from error
    except EngineError as error:
        if error.code == "bad-answer":
            raise
        raise _broken(name, error.message) from error
    if status != "success":
        raise _broken(name, f"it ended after {status!r}")


def _broken(name: str, text: str) -> HarnessError:
    code = "digest-mismatch" if "digest mismatch" in text else "pull-failed"
    hint = "check the network; the next try goes on where this one ended"
    return pull_refusal(name, text) or _BrokenPullError(f"Ollama cannot pull {name}: {one_line(text)}", hint=hint, code=code)


def create(client: httpx.Client, path: Path, digest: str, progress: Progress) -> str:
    """Send a GGUF as a blob, make a model of it, and return that model's name.

    Raises:
        CannotWriteError: no room. EngineError: Ollama does not understand the file.
    """
    import httpx

    name = local_name(digest)
    doing = f"take {path.name}"
    with translated(doing):
        if client.head(f"/api/blobs/{digest}").status_code != httpx.codes.OK:
            answer = client.post(f"/api/blobs/{digest}", content=_chunks(path, progress))
            if answer.is_error:
                raise _local_refusal(doing, answer.text)
    status = "nothing"
    try:
        with connected(client, doing) as sdk:
            for event in sdk.create(name, files={"model.gguf": digest}, stream=True):
                status = event.status or status
                progress(f"create: {one_line(status)}", 0, None)
    except EngineError as error:
        raise _local_refusal(doing, error.message) if error.code == "engine-refused" else error from error
    if status != "success":
        raise EngineError(f"Ollama did not create a model of the file: it ended after {status!r}", code="create-failed")
    return name


def _local_refusal(doing: str, text: str) -> HarnessError:
    if "no space left" in text.lower():
        hint = "make room where Docker keeps its volumes (docker system df)"
        return CannotWriteError(f"Ollama cannot {doing}: {one_line(text)}", hint=hint, code="disk-full")
    return EngineError(f"Ollama cannot {doing}: {one_line(text)}", code="create-failed")


def _chunks(path: Path, progress: Progress) -> Iterator[bytes]:
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
            done += len(block)
            progress(f"send {path.name}", done, size)


def present(client: httpx.Client, source: Source, options: Options, progress: Progress) -> tuple[str, dict[str, Any]]:
    """The model's name in a running server and what that says of it, after a pull or creation where it is not there.

    Raises:
        NotFoundError: it cannot be had; the hint names what is there. NotPermittedError: it is in a folder that a container may
            not read.
    """
    own_store = source.lent is None and options.models is None and options.sandbox != "process"
    if source.path is not None:
        name = local_name(source.model.digest or "")
        body = show(client, name) if options.sandbox == "process" else None
        if body is None:
            name = create(client, source.path, source.model.digest or "", progress)
            body = show(client, name)
    else:
        plain, name = over_plain_http(source.own_name), split_name(source.own_name)[0]
        body = _shown(client, name, source, options)
        if body is None and own_store:
            try:
                pull(client, name, progress, plain=plain)
            except NotFoundError as error:
                error.hint = _available_models(client, own_store)
                raise
            body = show(client, name)
    if body is None:
        where = "" if options.models is None else f" in {options.models}"
        raise NotFoundError(f"there is no model {name}{where}", hint=_available_models(client, own_store), code="no-such-model")
    return name, body


def _shown(client: httpx.Client, name: str, source: Source, options: Options) -> dict[str, Any] | None:
    """What a server says of a model. Of one in a folder of the user's that a container may not read, that it may not."""
    folder = source.lent or (models_folder(options.models) if options.models is not None else None)
    error: HarnessError | None = None
    try:
        body = show(client, name)
    except EngineError as refused:
        body, error = None, refused
    if body is None and folder is not None and options.sandbox != "process" and is_closed(folder, name):
        raise NotPermittedError(
            f"the models in {folder} belong to another account, and its files may not be read in a container",
            hint=CLOSED_FOLDER.format(folder),
            code="models-not-readable",
        )
    if error is not None:
        raise error
    return body


def _available_models(client: httpx.Client, pulls: bool) -> str:
    with connected(client, "list its models") as sdk:
        names = one_line(", ".join(sorted(one.model or "" for one in sdk.list().models)))
    if not pulls:  # what is lent is read only, and nothing is fetched into it
        return f"there are: {names or 'none'}; pull it there first (ollama pull), or leave --models out"
    there = f"in this volume: {names}; " if names else ""
    return f"{there}any name of ollama.com/library that the network reaches, or the path of a .gguf file"


def described(source: Source, body: Mapping[str, Any], size: int | None) -> Source:
    """The source with what ``/api/show`` says of it; ``size`` is what ``/api/tags`` says, bytes.

    Raises:
        NotFoundError: the model runs elsewhere. BadInputError: its runner logs nothing that could be measured.
    """
    if body.get("remote_host") or body.get("remote_model"):
        raise NotFoundError(
            f"{source.model.name} runs on {one_line(str(body.get('remote_host')))}: nothing of it is loaded here",
            code="cloud-model",
        )
    details, info = _mapping(body.get("details")), _mapping(body.get("model_info"))
    if details.get("format") not in (None, "", "gguf"):
        raise BadInputError(
            f"{source.model.name} is a model in {one_line(str(details.get('format')))}: Ollama's MLX runner logs no buffers, "
            "so its memory cannot be attributed",
            hint="choose a GGUF of the same model",
            code="mlx-model",
        )
    architecture = info.get("general.architecture") or details.get("family") or source.model.architecture
    blob = _BLOB.search(str(body.get("modelfile") or ""))
    kept = f"sha256:{blob['hex']}" if blob and source.weights == "full" else None
    sent = source.model.digest if source.path is not None else None
    capabilities = body.get("capabilities") or ()
    model = msgspec.structs.replace(
        source.model,
        digest=sent or kept or source.model.digest,
        stored_digest=kept if sent is not None and kept != sent else None,
        architecture=_text(architecture),
        quantization=_text(details.get("quantization_level")) or source.model.quantization,
        train_context=_count(info.get(f"{architecture}.context_length")) or source.model.train_context,
        layers=_count(info.get(f"{architecture}.block_count")) or source.model.layers,
    )
    return msgspec.structs.replace(
        source,
        model=model,
        tensors=source.tensors or tensors_of(body.get("tensors"), info),
        estimate=None if size is None else gguf.server_estimate(gguf.Header(metadata=dict(info), tensors=()), size),
        projector_bytes=_projector(body),
        embedding="embedding" in capabilities and "completion" not in capabilities,
    )


def check_digest(source: Source, wanted: str | None, manifest_digest: str | None) -> None:
    """Compare with the digest that the user pinned: of the model's weights, or of its manifest (what ``ollama ls`` shows).

    Raises:
        NotFoundError: it is another one.
    """
    found = [digest for digest in (source.model.digest, manifest_digest) if digest]
    if wanted is not None and not any(digest.startswith(wanted) for digest in found):
        raise NotFoundError(
            f"{source.own_name} is {' or '.join(found) or 'of an unknown digest'}, not {wanted}",
            hint="the tag has moved: calibrate it without the digest, or find the tag that has it",
            code="digest-differs",
        )


def tensors_of(listed: object, info: Mapping[str, Any]) -> Tensors | None:
    """Bytes by layer of ``/api/show``'s verbose tensors; ``None`` where they are not listed or of an unknown type."""
    if not isinstance(listed, list) or not listed:
        return None
    sizes = []
    for one in listed:
        size = _tensor_bytes(_mapping(one))
        if size is None:
            return None
        sizes.append((str(_mapping(one).get("name")), size))
    return gguf.tensor_bytes(gguf.Header(metadata=dict(info), tensors=tuple(sizes)))


def _tensor_bytes(tensor: Mapping[str, Any]) -> int | None:
    kind, shape = _TYPES.get(str(tensor.get("type")).upper()), tensor.get("shape")
    if kind is None or not isinstance(shape, list) or not all(isinstance(one, int) for one in shape):
        return None
    block, width = gguf.BLOCKS[kind]
    return math.prod(shape) // block * width


def _projector(body: Mapping[str, Any]) -> int:
    """Bytes of an image projector, from its parameter count at two bytes each (projectors are F16); 0 without one."""
    count = _count(_mapping(body.get("projector_info")).get("general.parameter_count"))
    return 2 * count if count else 0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return one_line(value) or None if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
