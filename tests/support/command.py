"""``harness`` called within the test's own process: what it prints, and the status with which it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """Runs the entry point itself, in a folder with a store of its own."""

    def __init__(self, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._here, self._monkeypatch, self._capfd = here, monkeypatch, capfd

    def __call__(self, *arguments: str, **env: str) -> Done:
        """Run it; ``env`` is added to the environment."""
        from harness.cli.main import main

        before = signal.getsignal(signal.SIGTERM)
        with self._monkeypatch.context() as patch:
            patch.chdir(self._here)
            for name in [name for name in os.environ if name.startswith("HARNESS_")]:
                patch.delenv(name)
            patch.setenv("HARNESS_STORE", str(self._here / "store"))
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["harness", *arguments])
            status = 0
            try:
                main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            finally:
                signal.signal(signal.SIGTERM, before)
        out, err = self._capfd.readouterr()
        return Done(status, out, err)
