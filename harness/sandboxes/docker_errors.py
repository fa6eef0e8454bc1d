"""What the daemon's refusals mean for the person who reads them. Pure: texts in, harness's errors out.

The texts are those of Docker Engine 20.10 to 28 (moby ``daemon/``, ``errdefs``) and of the OCI runtime behind it.
"""

from __future__ import annotations

import re
from typing import Final

from harness.errors import (
    BusyError,
    CannotWriteError,
    EngineError,
    HarnessError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UsageError,
)
from harness.text import one_line

_GPU_HINT: Final = "install the NVIDIA Container Toolkit and restart Docker, or use --gpus none; see harness doctor"
_SOCKET_HINT: Final = "add yourself to the group docker (which is as good as root), or run harness as root"

#: How the registry or the daemon says that an image does not exist (a private one says "denied", by intention).
_NO_IMAGE: Final = re.compile(
    r"no such image|manifest.*(unknown|not found)|not found: manifest|repository does not exist|access denied"
    r"|name unknown|requested access to the resource is denied",
    re.IGNORECASE,
)
_NO_GPU: Final = re.compile(
    r"could not select device driver|unknown.* runtime.*nvidia|nvidia-container|cdi device injection"
    r"|unresolvable cdi|error gathering device information|unknown device|libnvidia-ml",
    re.IGNORECASE,
)
_PORT_TAKEN: Final = re.compile(r"port is already allocated|address already in use", re.IGNORECASE)
_NO_PROGRAM: Final = re.compile(r"executable file not found|exec:.*no such file or directory", re.IGNORECASE)
_NOT_EXECUTABLE: Final = re.compile(r"(exec|starting container process).*permission denied", re.IGNORECASE)
_NO_SOURCE: Final = re.compile(r"bind source path does not exist", re.IGNORECASE)
_FULL: Final = re.compile(r"no space left on device", re.IGNORECASE)
_BAD_NAME: Final = re.compile(r"invalid reference format|must be lowercase", re.IGNORECASE)


def connection_error(text: str, address: str) -> HarnessError:
    """Why there is no talking to the daemon at ``address``."""
    if re.search(r"permission ?(denied|error)", text, re.IGNORECASE):
        return NotPermittedError(f"the Docker socket {address} may not be used", hint=_SOCKET_HINT)
    return UnavailableError(
        f"no Docker daemon answers at {address}",
        hint="start Docker (as root: systemctl start docker)",
        code="docker-absent",
    )


def silent_error(address: str, limit: float, doing: str | None = None) -> UnavailableError:
    """A daemon that takes a connection and says nothing, or too little too slowly."""
    what = f"cannot {doing}: " if doing else ""
    return UnavailableError(
        f"{what}the Docker daemon at {address} has not answered within {limit:.0f} s",
        hint="restart it (as root: systemctl restart docker)",
        code="docker-silent",
    )


def daemon_error(text: str, doing: str) -> HarnessError:
    """What a refusal (the API's message) means while ``doing`` something, as in ``start the container``."""
    said = one_line(text, 4000)
    message = f"cannot {doing}: {said}"
    errors: tuple[tuple[re.Pattern[str], HarnessError], ...] = (
        (
            _NO_GPU,
            UnavailableError(
                f"Docker cannot give a container an NVIDIA GPU: {said}", hint=_GPU_HINT, code="gpu-runtime-missing"
            ),
        ),
        (_PORT_TAKEN, BusyError(message, hint="choose another port, or none")),
        (_NO_SOURCE, NotFoundError(message)),
        (_FULL, CannotWriteError(message, hint="make room where Docker keeps its data (docker system df)")),
        (_NO_PROGRAM, NotFoundError(message, hint="does the image hold this engine?")),
        (_NOT_EXECUTABLE, NotPermittedError(message)),
        (re.compile("oci runtime|exec format error", re.IGNORECASE), EngineError(message, code="engine-crashed")),
    )
    for pattern, error in errors:
        if pattern.search(said):
            return error
    return UnavailableError(message, code="docker-error")


def image_error(text: str, reference: str) -> HarnessError:
    """Why an image cannot be had."""
    said = one_line(text, 4000)
    if _BAD_NAME.search(said):
        return UsageError(f"not the name of an image: {reference!r}")
    if _NO_IMAGE.search(said):
        return NotFoundError(f"there is no image {reference}, here or in its registry: {said}", code="image-not-found")
    if _FULL.search(said):
        return CannotWriteError(f"no room for the image {reference}: {said}")
    return UnavailableError(
        f"the image {reference} is not here and cannot be pulled: {said}",
        hint="check the network and the daemon's proxy, or bring the image with docker load",
        code="image-unavailable",
    )
