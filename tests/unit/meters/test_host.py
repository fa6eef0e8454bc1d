"""Host memory: what processes wrote to, and what the machine still has."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.meters.host import HostMeter, available_memory, cgroup_room
from harness.units import GIB, KIB, MIB


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _process(proc: Path, pid: int, anonymous_kib: int) -> None:
    _write(
        proc / str(pid) / "status",
        f"Name:\tllama-server\nVmRSS:\t  999999 kB\nRssAnon:\t  {anonymous_kib} kB\nRssFile:\t  777 kB\n",
    )


def test_anonymous_memory_is_summed_over_processes_and_nothing_else_counts(tmp_path: Path) -> None:
    _process(tmp_path, 10, 100)
    _process(tmp_path, 11, 23)
    _process(tmp_path, 12, 4096)
    assert HostMeter(tmp_path).read(frozenset({10, 11})).total_bytes == 123 * KIB


def test_a_process_that_has_ended_does_not_spoil_the_others(tmp_path: Path) -> None:
    _process(tmp_path, 10, 100)
    assert HostMeter(tmp_path).read(frozenset({10, 99})).total_bytes == 100 * KIB


@pytest.mark.parametrize("pids", [frozenset[int](), frozenset({99})])
def test_no_readable_process_is_no_reading_rather_than_zero(tmp_path: Path, pids: frozenset[int]) -> None:
    reading = HostMeter(tmp_path).read(pids)
    assert reading.total_bytes is None
    assert reading.reason


def test_a_kernel_thread_has_no_anonymous_memory_to_report(tmp_path: Path) -> None:
    _write(tmp_path / "2" / "status", "Name:\tkthreadd\nThreads:\t1\n")
    assert HostMeter(tmp_path).read(frozenset({2})).total_bytes is None


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    _write(proc / "meminfo", f"MemTotal:       {64 * MIB} kB\nMemFree:  1 kB\nMemAvailable:   {8 * MIB} kB\n")
    cgroup.mkdir()
    return proc, cgroup


def test_without_a_limit_all_available_memory_may_be_taken(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "0::/user.slice\n")
    _write(cgroup / "user.slice" / "memory.max", "max\n")
    _write(cgroup / "user.slice" / "memory.current", "12345\n")
    assert cgroup_room(proc, cgroup) is None
    assert available_memory(proc, cgroup) == 8 * GIB


def test_a_limit_of_the_second_kind_of_cgroups_counts_less_what_is_used(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "0::/job.scope\n")
    _write(cgroup / "job.scope" / "memory.max", f"{4 * GIB}\n")
    _write(cgroup / "job.scope" / "memory.current", f"{3 * GIB}\n")
    assert available_memory(proc, cgroup) == GIB


def test_a_limit_of_the_first_kind_of_cgroups_counts_too(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "12:cpu,cpuacct:/elsewhere\n9:memory:/docker/abc\n0::/\n")
    _write(cgroup / "memory" / "docker" / "abc" / "memory.limit_in_bytes", f"{2 * GIB}\n")
    _write(cgroup / "memory" / "docker" / "abc" / "memory.usage_in_bytes", f"{GIB}\n")
    assert available_memory(proc, cgroup) == GIB


def test_the_first_kind_says_unlimited_by_a_huge_number(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "9:memory:/\n")
    _write(cgroup / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    _write(cgroup / "memory" / "memory.usage_in_bytes", "0\n")
    assert cgroup_room(proc, cgroup) is None


def test_a_limit_above_our_own_cgroup_binds_us(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "0::/batch.slice/job.scope\n")
    _write(cgroup / "batch.slice" / "memory.max", f"{4 * GIB}\n")
    _write(cgroup / "batch.slice" / "memory.current", f"{2 * GIB}\n")
    _write(cgroup / "batch.slice" / "job.scope" / "memory.max", "max\n")
    _write(cgroup / "batch.slice" / "job.scope" / "memory.current", "0\n")
    assert available_memory(proc, cgroup) == 2 * GIB


def test_inside_a_container_the_hosts_path_leads_nowhere_and_the_root_has_the_limit(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "9:memory:/docker/abc\n")
    _write(cgroup / "memory" / "memory.limit_in_bytes", f"{GIB}\n")
    _write(cgroup / "memory" / "memory.usage_in_bytes", f"{2 * GIB}\n")
    assert available_memory(proc, cgroup) == 0


def test_a_machine_that_does_not_say_has_an_unknown_amount(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None
