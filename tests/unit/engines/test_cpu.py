"""What an engine was compiled for, and what this CPU has of it."""

from __future__ import annotations

from pathlib import Path

from harness.engines.cpu import cpu_flags, lacking

#: A wheel compiled for one CPU (b10434), and the flags of an AMD EPYC of the third generation.
SYSTEM_INFO = (
    "system_info: n_threads = 2 (n_threads_batch = 2) / 2 | CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX_VNNI = 1 | AVX2 = 1 | "
    "F16C = 1 | FMA = 1 | BMI2 = 1 | AMX_INT8 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | \n"
)
EPYC = "processor\t: 0\nflags\t\t: fpu sse2 pni ssse3 fma sse4_2 avx f16c bmi1 avx2 bmi2 vaes\nbugs\t\t: none\n"


def test_what_a_build_needs_and_a_cpu_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(EPYC)
    assert lacking(f"main: starting\n{SYSTEM_INFO}load: \n", cpu_flags(tmp_path / "cpuinfo")) == ("AVX_VNNI", "AMX_INT8")


def test_nothing_is_claimed_of_what_is_not_known(tmp_path: Path) -> None:
    assert lacking("Illegal instruction\n", frozenset({"avx2"})) == ()
    assert lacking(SYSTEM_INFO, cpu_flags(tmp_path / "there is none")) == ()
