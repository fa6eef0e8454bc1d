"""A daemon that is frozen, or drips: every talk with it ends in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import HarnessError, UnavailableError
from harness.sandboxes import docker_client
from harness.sandboxes.docker_client import Daemon
from harness.sandboxes.reaper_main import TimedSocket
from tests.support.slow_daemon import SlowDaemon


def test_a_frozen_daemon_is_found_out_by_a_probe_and_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_client, "PROBE_LIMIT", 0.2)
    with SlowDaemon(tmp_path, "frozen") as slow:
        for _ in range(2):
            with pytest.raises(UnavailableError) as caught:
                Daemon(slow.address)
            assert caught.value.code == "docker-silent"
            monkeypatch.setattr(docker_client, "ping", pytest.fail)


@pytest.mark.parametrize(
    "talk",
    [
        lambda daemon: daemon.containers("harness=1"),
        lambda daemon: daemon.inspect("c"),
        lambda daemon: daemon.attach("c"),
        lambda daemon: daemon.pull("ollama/ollama:1"),
        lambda daemon: daemon.last_line("c"),
    ],
)
def test_a_dripping_daemon_is_cut_off(tmp_path: Path, talk: Callable[[Daemon], object]) -> None:
    """Each read succeeds, so that a timeout of reads would never come."""
    with SlowDaemon(tmp_path, "dripping") as slow, Daemon(slow.address, limit=1) as daemon:
        with pytest.raises(HarnessError) as caught:
            talk(daemon)
        assert caught.value.code in ("docker-silent", "image-unavailable")
        assert slow.asked.wait(200)


def test_no_wait_of_a_socket_lasts_beyond_its_deadline(tmp_path: Path) -> None:
    with SlowDaemon(tmp_path, "frozen") as slow, TimedSocket(lambda: time.monotonic() - 1) as link, pytest.raises(TimeoutError):
        link.connect(slow.address.removeprefix("unix://"))
