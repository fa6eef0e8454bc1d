"""Servers of an engine that run on this machine already, whoever started them: as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from harness.engines.registry import policy_of
from harness.model.facts import EngineName
from harness.units import format_size

#: How long a remote device may take to answer, seconds.
_ANSWER: Final = 1.0
#: What to do about one that takes none.
SILENT_HINT: Final = "start ggml-rpc-server there, or take it out of LLAMA_ARG_RPC"


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a running server says it holds. Bytes by its own account; ``context`` in tokens per slot."""

    name: str
    size_bytes: int | None = None
    gpu_bytes: int | None = None
    context: int | None = None


class RunningServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server of the engine that runs on this machine, whoever started it.

    ``settings`` are its variables that decide about memory; without ``readable`` they could not be read (another account's).
    """

    pid: int | None
    port: int | None
    version: str | None = None
    models: tuple[RunningModel, ...] = ()
    settings: dict[str, str] = {}
    readable: bool = False


def remote_servers(env: Mapping[str, str]) -> tuple[str, ...]:
    """Addresses of llama.cpp's remote devices (``LLAMA_ARG_RPC``)."""
    return tuple(filter(None, (one.strip() for one in env.get("LLAMA_ARG_RPC", "").split(","))))


def silence(server: str) -> str | None:
    """Why ``HOST:PORT`` takes no connection; ``None`` where it does."""
    import socket

    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER):
            return None
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, OverflowError):
        return "not HOST:PORT"


def held_by(engine: EngineName, servers: Sequence[RunningServer]) -> tuple[str, ...]:
    """What servers of an engine hold now, one sentence a model, with what to type so that it goes."""
    policy, found = policy_of(engine), []
    for server in servers:
        for model in server.models:
            part = "all" if model.gpu_bytes == model.size_bytes else format_size(model.gpu_bytes)
            gpu = f", {part} of it on the GPU" if model.gpu_bytes else ""
            context = f" at {model.context:,} tokens" if model.context else ""
            size = (
                "it does not say how much"
                if model.size_bytes is None
                else f"{format_size(model.size_bytes)} by its own account"
            )
            command = policy.unload_command(model.name)
            found.append(
                f"the {policy.title} that runs here (port {server.port}) holds {model.name}{context}: "
                f"{size}{gpu}{f'; to free it: {command}' if command else ''}"
            )
    return tuple(found)
