"""The llama-server that comes from PyPI: ``xllamacpp``, run by this Python as a program of its own."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from harness.engines.llama_server.xllamacpp_server import PACKAGE, build_of, installed_version

#: The program that serves; a process is known by it.
PROGRAM: Final = Path(__file__).with_name("xllamacpp_server.py")
#: What its x86-64 wheels are compiled for (``system_info`` of b11549).
_NEEDED: Final = frozenset({"avx2", "bmi2", "f16c", "fma"})


def embedded_command() -> tuple[str, ...] | None:
    """How the embedded llama-server is started; ``None`` where its package is not installed."""
    return (sys.executable, "-I", str(PROGRAM)) if find_spec(PACKAGE) is not None else None


def embedded_build() -> str | None:
    """The build of the embedded llama-server, as ``b11549``; ``None`` where the package is not installed.

    From the name of its metadata folder: importlib.metadata takes longer than the whole of a prediction.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    version = installed_version(Path(spec.origin).parent.parent)
    return None if version is None else build_of(version)


def missing_instructions(flags: frozenset[str]) -> tuple[str, ...]:
    """Instruction sets that the embedded engine needs and a CPU with these flags lacks, named as in its log."""
    return tuple(sorted(name.upper() for name in _NEEDED - flags)) if flags else ()
