"""Requests to a running Ollama, with its errors as ours.

API: docs/api.md and server/routes.go of ollama/ollama. The official client is used for everything that it knows; it has no
verbose ``/api/show``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from harness.engines.base import KILLED, NO_ANSWER, could_not_allocate, was_killed
from harness.errors import BadInputError, BusyError, EngineError, HarnessError, NotFoundError, UnavailableError, WontFitError
from harness.text import one_line

if TYPE_CHECKING:
    import httpx
    from ollama import Client


@contextlib.contextmanager
def connected(client: httpx.Client, doing: str) -> Iterator[Client]:
    """The official client, on the address and with the timeouts of ours, while ``doing`` something.

    Raises:
        WontFitError: it could not allocate. NotFoundError: no such model. BusyError: no answer in time.
        EngineError: it refused, answered nonsense, or hung up (code ``no-answer``).
    """
    import ollama
    import pydantic

    # The user's key for Ollama's cloud is nothing for the engine: without a header of ours the client would send it.
    sdk = ollama.Client(host=str(client.base_url), timeout=client.timeout, trust_env=False, headers={"authorization": "none"})
    try:
        with sdk, translated(doing):
            yield sdk
    except ollama.ResponseError as error:
        raise refusal(f"Ollama cannot {doing}: {one_line(error.error)}", error.status_code) from error
    except (ValueError, TypeError, pydantic.ValidationError) as error:
        raise EngineError(f"Ollama's answer was not understood while it should {doing}", code="bad-answer") from error


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Errors of the connection as ours."""
    import httpx

    try:
        yield
    except httpx.TimeoutException as error:
        raise BusyError(
            f"Ollama took too long to {doing}", hint="raise --timeout, or see the engine's log", code="engine-timeout"
        ) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise EngineError(f"Ollama did not answer while it should {doing}: {error}", code=NO_ANSWER) from error


def refusal(message: str, status: int) -> HarnessError:
    """What an error answer means."""
    if could_not_allocate(message):
        return WontFitError(message)
    if was_killed(message):
        return EngineError(message, code=KILLED)
    if status == 404:
        return NotFoundError(message, code="no-such-model")
    if status == 503:
        return BusyError(message, code="engine-busy")
    return EngineError(message, code="engine-refused")


def show(client: httpx.Client, name: str) -> dict[str, Any] | None:
    """``POST /api/show`` with the tensors; ``None`` where Ollama has no such model.

    Raises:
        EngineError: it refused or answered nonsense.
    """
    import httpx

    with translated(f"describe {name}"):
        answer = client.post("/api/show", json={"model": name, "verbose": True})
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise EngineError(f"Ollama's description of {name} was not understood", code="bad-answer")
    if answer.is_error:
        raise refusal(f"Ollama cannot describe {name}: {one_line(str(body.get('error')))}", answer.status_code)
    return body


def pull_refusal(name: str, text: str) -> HarnessError | None:
    """Why a pull failed for good; ``None`` where trying again may help (server/images.go, server/download.go)."""
    from harness.errors import CannotWriteError, NotPermittedError

    said, message = text.lower(), f"Ollama cannot pull {name}: {one_line(text)}"
    if any(
        sign in said for sign in ("file does not exist", "not found", "manifest unknown", "name unknown", "invalid model name")
    ):
        return NotFoundError(f"there is no model {name} in its registry: {one_line(text)}", code="no-such-model")
    if any(sign in said for sign in ("no such host", "connection refused", "network is unreachable", "no route to host")):
        hint = "check the network and its proxy, lend models with --models, or give the path of a .gguf file"
        return UnavailableError(message, hint=hint, code="registry-unreachable")
    if "no space left" in said or "disk quota" in said:
        return CannotWriteError(message, hint="make room where Docker keeps its volumes (docker system df)", code="disk-full")
    if "read-only file system" in said:
        return CannotWriteError(message, hint="--models is mounted read-only: pull the model there first")
    if "newer version" in said:
        return UnavailableError(message, hint="name a newer Ollama with --image", code="engine-too-old")
    if any(sign in said for sign in ("unauthorized", "denied", "forbidden", "401", "403")):
        return NotPermittedError(message)
    if "unsupported" in said or "not a gguf" in said or "invalid file magic" in said:
        return BadInputError(message)
    return None
