"""Ollama's registry: where the manifest of a model is, and what it names (server/images.go, types/model/name.go).

A manifest is Docker's (distribution.manifest.v2): a configuration and layers, each with its digest and size.
"""

from __future__ import annotations

import json
import re
from typing import Final

from harness.engines.base import Address, Layer
from harness.engines.ollama.names import place_of, split_name
from harness.errors import BadInputError

_ACCEPT: Final = "application/vnd.docker.distribution.manifest.v2+json"
_KINDS: Final = {"application/vnd.ollama.image.model": "model", "application/vnd.ollama.image.projector": "projector"}
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
#: A model has so many layers at most.
_LAYERS: Final = 64


class OllamaRegistry:
    """Addresses of one registry; ``base`` stands in for ``https://HOST`` of every name in tests."""

    def __init__(self, base: str | None = None) -> None:
        self._base = base

    def manifest(self, name: str) -> Address:
        """Where the manifest of a model is.

        Raises:
            NotFoundError: Ollama could not know such a name.
        """
        tag = place_of(split_name(name)[0])[3]
        return Address(url=f"{self._place(name)}/manifests/{tag}", headers={"accept": _ACCEPT})

    def layers(self, name: str, text: bytes) -> tuple[Layer, ...]:
        """What a manifest names; the configuration is one of them.

        Raises:
            BadInputError: it is none.
        """
        try:
            body = json.loads(text)
            listed = [body["config"], *body["layers"]]
            found = [(one["digest"], one["size"], one["mediaType"]) for one in listed[: _LAYERS + 1]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInputError(f"the manifest of {name} was not understood", code="bad-manifest") from error
        layers = []
        for digest, size, media in found:
            sane = isinstance(digest, str) and _DIGEST.fullmatch(digest) and isinstance(size, int) and 0 <= size < 1 << 45
            if not sane or isinstance(size, bool):
                raise BadInputError(f"the manifest of {name} names an invalid layer", code="bad-manifest")
            url = f"{self._place(name)}/blobs/{digest}"
            layers.append(Layer(kind=_KINDS.get(str(media), "document"), digest=digest, size=size, url=url))
        return tuple(layers)

    def _place(self, name: str) -> str:
        host, namespace, model, _ = place_of(split_name(name)[0])
        return f"{self._base or f'https://{host}'}/v2/{namespace}/{model}"
