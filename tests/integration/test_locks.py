"""Two harnesses, one GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import BusyError
from harness.sandboxes.locks import hold

HOLDER = """
import sys
from pathlib import Path
from harness.sandboxes.locks import hold
with hold(["GPU-b"], Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_is_told_who_is_first_and_holds_nothing(tmp_path: Path) -> None:
    """A run that cannot have all of its GPUs lets go of those it had."""
    with start_holder(tmp_path) as holder:
        with pytest.raises(BusyError, match=f"process {holder.pid}") as caught, hold(["GPU-a", "GPU-b"], tmp_path):
            pass
        with hold(["GPU-a"], tmp_path):
            pass
        holder.kill()

    assert caught.value.exit_code == 75


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    """After kill -9 the next run starts at once; no file has to be removed."""
    with start_holder(tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()

    with hold(["GPU-b"], tmp_path):
        pass
