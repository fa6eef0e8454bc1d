"""A Docker daemon behind a Unix socket that says nothing, or answers a byte at a time for ever."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal

PING = b"HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 2\r\n\r\nOK"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


class SlowDaemon:
    """``frozen`` accepts connections and says nothing; ``dripping`` is there, and drips its answers."""

    def __init__(self, folder: Path, kind: Literal["frozen", "dripping"]) -> None:
        self.address = f"unix://{folder}/slow.sock"
        self.kind = kind
        self.asked = threading.Event()
        self._over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "slow.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> SlowDaemon:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(link,)))
                self._threads[-1].start()

    def _serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            asked = link.recv(4096)
            if self.kind == "frozen":
                self.asked.set()
            if self.kind == "dripping" and b"/_ping" in asked:
                link.sendall(PING)
                return
            self.asked.set()
            if self.kind == "dripping" and b"/attach" not in asked:  # of an attached stream the head itself drips
                link.sendall(HEAD)
            while not self._over.wait(0.02):
                if self.kind == "dripping":
                    link.sendall(b" ")
