"""How an engine is started outside of harness so that it runs as was judged: what exports write for other programs."""

from __future__ import annotations

import msgspec


class StartCommand(msgspec.Struct, frozen=True, kw_only=True):
    """One start of an engine.

    ``program`` begins its command line outside a container and ``arguments`` follow; in one, ``arguments`` alone stand after
    the image. ``model_option`` names a file of weights (``None``: the engine finds it by name), ``port_option`` a port.
    ``variables`` are those of its environment, ``parameters`` what a model file of its own may set, ``preset`` the same options
    as keys. ``volumes`` are names and places in the container, ``health`` the path that answers when it is ready.
    ``shared_memory`` says that its processes need the host's, ``formats`` which exports are this engine's alone.
    """

    program: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    model_option: str | None = None
    port: int
    port_option: str | None = None
    variables: dict[str, str] = {}
    parameters: dict[str, int] = {}
    preset: dict[str, str] = {}
    volumes: dict[str, str] = {}
    health: str = "/health"
    shared_memory: bool = False
    formats: tuple[str, ...] = ()
