"""``harness`` started as a process of its own, and the engines that run because of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from harness.engines.llama_server.policy import PROGRAM as EMBEDDED

ROOT = Path(__file__).parents[2]
Start = Callable[..., subprocess.Popen[str]]


def environment(here: Path, **env: str) -> dict[str, str]:
    """This process's environment with a store in ``here`` and no setting of harness but those of ``env``."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HARNESS_")}
    return {**clean, "HARNESS_STORE": str(here / "store"), "PYTHONPATH": str(ROOT), **env}


@contextmanager
def background(here: Path) -> Iterator[Start]:
    """Starts commands in ``here``; those that still run at the end are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", *arguments],
            cwd=here,
            env=environment(here, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()


def engines_of(model: Path) -> list[psutil.Process]:
    """llama-servers whose command line names ``model``, a file or its folder."""
    running = [(one, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    return [
        one
        for one, words in running
        if any(Path(word).name in ("llama-server", EMBEDDED) for word in words[:3]) and str(model) in " ".join(words)
    ]
