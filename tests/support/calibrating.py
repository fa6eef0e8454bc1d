"""A process that calibrates and stops at a stage, to be killed there: ``python -m tests.support.calibrating …``."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.options import RunOptions
from harness.store.store import Store


def main(model: str, store: str, stop_at: str) -> None:
    """Calibrate ``model`` on host memory; say each stage on stdout, and stay at the second ``stop_at`` until told."""
    seen = 0

    def hook(stage: str) -> None:
        nonlocal seen
        seen += stage == stop_at
        if seen == 2:
            sys.stdout.write(f"{stage}\n")
            sys.stdout.flush()
            sys.stdin.readline()

    options = RunOptions(model=model, engine="llama-server", gpus="none", contexts=(1024, 2048, 4096), speed=False, timeout=200)
    prepare(options, Store(Path(store)), Path.cwd()).calibrate(Observer(), hook)


if __name__ == "__main__":
    main(*sys.argv[1:])
