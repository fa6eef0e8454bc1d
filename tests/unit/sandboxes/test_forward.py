"""Connections that are passed on to an engine in a container."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from harness.sandboxes.forward import Forwarder


@pytest.fixture
def engine() -> Iterator[socket.socket]:
    """Answers one connection with what it was sent, in capitals, once the sender has ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                asked = b"".join(iter(lambda: link.recv(4096), b""))
                link.sendall(asked.upper())

        threading.Thread(target=answer, daemon=True).start()
        yield listener


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10.0) as link:
        link.sendall(b"hello")
        link.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: link.recv(4096), b""))


def test_both_directions_are_passed_on_to_their_ends(engine: socket.socket) -> None:
    forwarder = Forwarder(None, engine.getsockname())
    assert ask(forwarder.port) == b"HELLO"
    forwarder.close()


def test_a_process_with_thousands_of_open_files_is_served_too(engine: socket.socket) -> None:
    """``select()`` knows no descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        forwarder = Forwarder(None, engine.getsockname())
        assert ask(forwarder.port) == b"HELLO"
        forwarder.close()
    finally:
        for one in opened:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
