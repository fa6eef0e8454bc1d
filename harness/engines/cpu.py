"""Which instructions this CPU has, and which of those that an engine was compiled for it lacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

#: llama.cpp's names in ``system_info`` (``ggml_backend_cpu_get_features``) by the kernel's in /proc/cpuinfo, where these
#: are more than lower case.
_KERNEL_NAMES: Final = {
    "SSE3": "pni", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi",
}  # fmt: skip
_X86: Final = re.compile(r"\b((?:SSSE|SSE|AVX|AMX|BMI|FMA|F16C)\w*) = 1\b")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature flags of this CPU (Linux, x86-64); empty where they cannot be read."""
    try:
        match = re.search(r"^flags\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(match[1].split()) if match else frozenset()


def lacking(log: str, flags: frozenset[str]) -> tuple[str, ...]:
    """Instruction sets that llama.cpp's ``system_info`` line in a log names as compiled in, and a CPU with these flags lacks.

    Empty where the log has no such line, or nothing is known of the CPU.
    """
    line = next((line for line in log.splitlines() if "system_info" in line), "")
    if not flags:
        return ()
    return tuple(name for name in _X86.findall(line) if _KERNEL_NAMES.get(name, name.lower()) not in flags)
