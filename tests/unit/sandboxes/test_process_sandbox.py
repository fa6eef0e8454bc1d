"""Ports, programs, environments and secrets of processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import BusyError, NotFoundError, NotPermittedError, UsageError
from harness.sandboxes.base import Launch
from harness.sandboxes.environment import clean_environment
from harness.sandboxes.process import ProcessSandbox, free_port


@pytest.fixture
def sandbox() -> Iterator[ProcessSandbox]:
    with ProcessSandbox() as opened:
        yield opened


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        with pytest.raises(BusyError, match="is taken"):
            free_port(other.getsockname()[1])


def test_a_port_just_given_up_is_free() -> None:
    """Connections of an engine that has ended (TIME_WAIT) do not block its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the server's side closes first, and waits
        client.close()

    assert free_port(port) == port


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_not_a_port(port: int) -> None:
    with pytest.raises(UsageError):
        free_port(port)


@pytest.mark.parametrize("name", ["no-such-engine", "/no/such/engine", "/", "/a\0b"])
def test_a_missing_program(sandbox: ProcessSandbox, tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError):
        sandbox.start(Launch(argv=(name,)), sandbox.site(), tmp_path / "log")


def test_a_program_without_the_executable_bit(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\n")

    with pytest.raises(NotPermittedError) as caught:
        sandbox.start(Launch(argv=(str(program),)), sandbox.site(), tmp_path / "log")

    assert caught.value.hint is not None
    assert "chmod +x" in caught.value.hint


def test_the_environment_is_small() -> None:
    """GPUs stay usable; tokens, other programs' settings and the engine's own stay out; proxies come on demand."""
    ours = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "VK_DRIVER_FILES": "/x.json",
        "HF_TOKEN": "t",
        "PYTHONPATH": "/p",
        "LLAMA_ARG_CTX_SIZE": "9",
        "OLLAMA_NUM_PARALLEL": "4",
        "HTTPS_PROXY": "http://proxy",
    }

    assert clean_environment(ours) == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "VK_DRIVER_FILES": "/x.json"}
    assert clean_environment(ours, network=True)["HTTPS_PROXY"] == "http://proxy"
    assert clean_environment({})["PATH"]
