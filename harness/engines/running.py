"""Servers of an engine that run on this machine already, whoever started them: as data."""

from __future__ import annotations

import msgspec


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
