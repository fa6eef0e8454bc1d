"""Repositories of the Hugging Face Hub, through its own client (the extra ``hub``): files, sizes, digests, revision, token."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

from harness.errors import BadInputError, NotFoundError, NotPermittedError, UnavailableError
from harness.headers.sources import SPLIT, Found, Part, split_names
from harness.installation import install_hint
from harness.text import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Quantisations as their files are named; the last one in a name counts.
_QUANTIZATION: Final = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|F16|F32))(?![A-Za-z0-9])", re.IGNORECASE
)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
#: Files of a repository that are looked at.
_MOST: Final = 5000


def quantization_of(name: str) -> str | None:
    """The quantisation that a file's name says."""
    found = _QUANTIZATION.findall(name)
    return found[-1].upper() if found else None


def models_of(source: str, repository: str, revision: str | None) -> tuple[Found, ...]:
    """The GGUF models of a repository, at the revision that is current.

    Raises:
        NotFoundError, NotPermittedError: as the Hub says. UnavailableError: it cannot be reached, or its client is not here.
    """
    commit, siblings, headers = _listed(repository, revision)
    from huggingface_hub import hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT")
    files = {one.name: one for one in _files(siblings)}

    def part(name: str) -> Part:
        one = files[name]
        url = hf_hub_url(repository, name, revision=commit, endpoint=endpoint)
        return Part(name=name, url=url, size=one.size, digest=one.digest, headers=headers)

    projectors = [name for name in files if "mmproj" in name.rpartition("/")[2].lower()]
    found = []
    for name in files:
        split = SPLIT.fullmatch(name)
        if name in projectors or "imatrix" in name.lower() or (split is not None and int(split["number"]) != 1):
            continue
        names = split_names(name)
        if any(one not in files for one in names):
            continue  # half of a model is none
        found.append(
            Found(
                source=f"{source}#{name}",
                name=name.rpartition("/")[2],
                parts=tuple(part(one) for one in names),
                projector=part(projectors[0]) if projectors else None,
                quantization=quantization_of(name.removesuffix(".gguf")),
                revision=commit,
            )
        )
    if not found:
        raise NotFoundError(
            f"there is no GGUF in {repository}", hint="the same model often stands in a repository that ends in -GGUF",
            code="no-gguf",
        )  # fmt: skip
    return tuple(found)


def _files(siblings: list[Any]) -> Iterator[Part]:
    for one in siblings[:_MOST]:
        name, size = str(one.rfilename), one.size
        if not name.endswith(".gguf") or not name.isprintable() or ".." in name.split("/"):
            continue
        sha256 = str(getattr(one.lfs, "sha256", None) or "")
        yield Part(
            name=name,
            size=size if isinstance(size, int) and size > 0 else None,
            digest=f"sha256:{sha256}" if _DIGEST.fullmatch(sha256) else None,
        )


def _listed(repository: str, revision: str | None) -> tuple[str, list[Any], dict[str, str]]:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import build_hf_headers
    except ImportError as error:
        raise UnavailableError(
            "models of the Hugging Face Hub are read through its own client, which is not installed",
            hint=f"{install_hint('hub')}; or give the https URL of the .gguf file",
            code="no-hub",
        ) from error
    try:
        hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        info = hub.model_info(repository, revision=revision, files_metadata=True, timeout=20.0)
        headers = {key: value for key, value in build_hf_headers().items() if key.lower() == "authorization"}
    except GatedRepoError as error:
        raise NotPermittedError(
            f"{repository} is gated: {_first(error)}",
            hint=f"accept its terms at https://huggingface.co/{repository}, and log in with: hf auth login",
            code="source-denied",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        where = repository if revision is None else f"{repository} at {revision}"
        hint = "a private repository needs a token: hf auth login"
        raise NotFoundError(f"the Hugging Face Hub has no {where}", hint=hint, code="no-such-model") from error
    except HFValidationError as error:
        raise BadInputError(f"{repository} is not a repository name: {_first(error)}", code="bad-url") from error
    except HfHubHTTPError as error:
        raise UnavailableError(f"the Hugging Face Hub: {_first(error)}", code="source-unreachable") from error
    except Exception as error:
        raise UnavailableError(
            f"the Hugging Face Hub cannot be reached: {_first(error)}",
            hint="check the network and its proxy (HTTPS_PROXY)",
            code="source-unreachable",
        ) from error
    if not info.sha:
        raise BadInputError(f"{repository} has no revision", code="bad-source")
    return str(info.sha), list(info.siblings or ()), headers


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__, 300)
