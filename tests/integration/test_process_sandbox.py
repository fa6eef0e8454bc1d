"""Ports, programs, environments and secrets of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.sandboxes.base import Launch
from harness.sandboxes.process import ProcessSandbox
from tests.support.waiting import until


@pytest.fixture
def sandbox() -> Iterator[ProcessSandbox]:
    with ProcessSandbox() as opened:
        yield opened


@pytest.mark.parametrize("name", ["../token", "", "..", "a/b", "a\0b"])
def test_a_secret_cannot_leave_its_folder(sandbox: ProcessSandbox, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        sandbox.start(Launch(argv=("true",), secrets={name: "x"}), sandbox.site(), tmp_path / "log")


def test_a_log_of_a_process_is_masked_at_its_end(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "echo http://user:passw0rd@proxy s3cr3t-s3cr3t; exec sleep 60"
    launch = Launch(argv=("sh", "-c", script), hidden=("s3cr3t-s3cr3t",))
    running = sandbox.start(launch, sandbox.site(), log)
    until(lambda: "proxy" in log.read_text(), "the line")
    running.stop()
    assert log.read_text() == f"http://{'*' * 13}@proxy {'*' * 13}\n"
