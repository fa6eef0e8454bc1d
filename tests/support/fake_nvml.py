"""The unmodified nvidia-ml-py on a driver library that a test compiles and moves."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
UUID = "GPU-11111111-2222-3333-4444-555555555555"
OTHER = "GPU-66666666-7777-8888-9999-000000000000"
GIB = 1 << 30


def compile_library(folder: Path, *flags: str, source: str = SOURCE.name) -> Path:
    library = folder / f"{Path(source).stem}{''.join(flags)}.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *flags, "-o", str(library), str(SOURCE.with_name(source))]
    subprocess.run(command, check=True, timeout=60)
    return library


@functools.cache
def library() -> Path:
    """The library, compiled once for all tests of a session, in the folder that is removed after it."""
    return compile_library(Path(os.environ["XDG_RUNTIME_DIR"]))


class FakeDriver:
    """A driver with two GPUs of 24 GiB; :meth:`holds` says what is on them."""

    def __init__(self, library: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import pynvml

        self._state = state
        monkeypatch.setenv("FAKE_NVML_STATE", str(state))
        # Without a SONAME the library stands for the driver in these tests alone, not in the whole process.
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        self.holds()

    def holds(self, *lines: str, used: int = GIB) -> None:
        """What the driver says from now on; ``used`` bytes are in use on the first GPU."""
        gpus = [f"gpu {UUID} {24 * GIB} {used} NVIDIA Test A", f"gpu {OTHER} {24 * GIB} 0 NVIDIA Test B"]
        part = self._state.with_suffix(".part")
        part.write_text("\n".join(["driver 580.95.05", *gpus, *lines, ""]))
        part.replace(self._state)

    def unload(self) -> None:
        self._state.unlink()
