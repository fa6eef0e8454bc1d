"""From 127.0.0.1 to an engine in a container that has no network but a bridge of its own: Docker publishes no port there."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import Final

#: How long an engine's machine may take to take a connection, seconds: it is this machine.
CONNECT_LIMIT: Final = 5.0
_PIECE: Final = 1 << 16


class Forwarder:
    """Listens on ``port`` of 127.0.0.1 (``None``: any free one) and passes each connection on to ``target``.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(self, port: int | None, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port or 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="harness-forward", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are open end with the engine."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(link,), name="harness-forward", daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError), socket.create_connection(self._target, CONNECT_LIMIT) as engine:
            engine.settimeout(None)
            for one in (link, engine):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with selectors.DefaultSelector() as ends:  # select() itself knows no descriptor above 1023
                ends.register(link, selectors.EVENT_READ, (link, engine))
                ends.register(engine, selectors.EVENT_READ, (engine, link))
                while ends.get_map():
                    for key, _ in ends.select():
                        source, other = key.data
                        data = source.recv(_PIECE)
                        if data:
                            other.sendall(data)
                        else:
                            ends.unregister(source)
                            other.shutdown(socket.SHUT_WR)
