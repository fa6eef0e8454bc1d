"""``make test-gpu`` on the compiled stand-ins of the driver and of CUDA: the whole way to the file, on any machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from harness.units import GIB, MIB
from tests.support.cuda_program import CONTEXT, POOL, TOTAL, write_cuda_program
from tests.support.fake_nvml import UUID, compile_library

pytestmark = pytest.mark.requires("gcc")
ROOT = Path(__file__).parents[2]
SECTIONS = "machine,allocations,reading,doctor,middle,edge"


class Machine:
    """A folder with driver libraries, an engine, and what the "GPU" holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = folder / "processes"
        self.processes.mkdir()
        compile_library(folder).rename(folder / "libnvidia-ml.so.1")
        compile_library(folder, source="fake_cuda.c").rename(folder / "libcuda.so.1")
        self.state = folder / "state"
        lines = ["driver 580.159.04", f"gpu {UUID} {TOTAL} 0 NVIDIA Test A", f"processes {self.processes}"]
        self.state.write_text("\n".join([*lines, ""]))
        self.engine = write_cuda_program(folder / "llama-server", self.processes)

    def report(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ, "PYTHON": sys.executable, "LD_LIBRARY_PATH": str(self.folder), "FAKE_NVML_STATE": str(self.state),
            "FAKE_CUDA_PROCESSES": str(self.processes),
        }  # fmt: skip
        command = ["sh", str(ROOT / "scripts/gpu_report.sh"), "-o", str(self.folder / "out.tar.gz"), *arguments]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=240)

    def texts(self) -> dict[str, str]:
        with tarfile.open(self.folder / "out.tar.gz") as archive:
            return {one.name: archive.extractfile(one).read().decode() for one in archive.getmembers()}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def texts(machine: Machine) -> dict[str, str]:
    done = machine.report("--engine-binary", str(machine.engine), "--models", "tiny", "--only", SECTIONS)
    assert done.returncode == 0, done.stderr
    return machine.texts()


@pytest.fixture(scope="module")
def report(texts: dict[str, str]) -> dict[str, Any]:
    return dict(json.loads(texts["gpu-report/report.json"]))


def test_every_section_comes_to_its_end(report: dict[str, Any]) -> None:
    assert report["failed"] == report["skipped"] == {}
    assert set(report["sections"]) == set(SECTIONS.split(","))


def test_allocations_are_seen_by_process(report: dict[str, Any]) -> None:
    steps = {one["step"]: one for one in report["sections"]["allocations"]["steps"]}
    assert steps["context"]["listed"] == [CONTEXT]
    assert steps["1 GiB"]["listed"] == [CONTEXT + GIB]
    assert steps["a second process with 3 GiB"]["listed"] == [CONTEXT, CONTEXT + 3 * GIB]
    assert steps["both have ended"]["device_used"] == steps["nothing"]["device_used"]


def test_overhead_is_told_before_and_after_a_prompt(report: dict[str, Any]) -> None:
    points = [load for load in report["sections"]["middle"]["loads"] if load["purpose"] == "point"]
    assert [load["context"] for load in points] == [8192, 32_768, 65_536]
    for load in points:
        assert load["overhead_idle"] == pytest.approx(CONTEXT, abs=0.05 * MIB)
        assert load["overhead_busy"] == pytest.approx(CONTEXT + POOL[512], abs=0.05 * MIB)
        assert (load["basis"], load["left"]) == ("process", 0)
    assert "start_gb" in report["sections"]["middle"]["artifact"]


def test_verdicts_on_cards_acted_out_by_another_process_are_what_the_engine_does(report: dict[str, Any]) -> None:
    cards = report["sections"]["edge"]["cards"]
    assert {card["check"]["verdict"] for card in cards} == {"fits", "offload"}
    decided = [card for card in cards if not card["check"]["tight"]]
    assert len(decided) >= 5
    for card in decided:
        assert (card["check"]["verdict"] == "fits") == card["engine"]["fully"]
        assert card["check"]["layers_offloaded"] == card["engine"]["layers"]


def test_nothing_in_the_file_names_the_machine(machine: Machine, texts: dict[str, str]) -> None:
    everything = "\n".join([*texts, *texts.values()])
    for name in (UUID, str(machine.folder), str(ROOT), str(Path.home())):
        assert name not in everything
    assert re.search(rf"\b{re.escape(socket.gethostname())}\b", everything) is None
    assert "GPU-00000000-0000-0000-0000-000000000001" in texts["gpu-report/report.json"]
    assert any(name.endswith("record.json") for name in texts)
    assert any(name.endswith("engine-0.log") for name in texts)


def test_without_time_each_section_says_so(machine: Machine) -> None:
    done = machine.report("--seconds", "1", "--only", "machine,middle")
    assert done.returncode == 0, done.stderr
    skipped = json.loads(machine.texts()["gpu-report/report.json"])["skipped"]
    assert set(skipped) == {"machine", "middle"}


def test_without_an_engine_only_the_driver_is_asked(machine: Machine) -> None:
    machine.report("--only", "machine,middle")
    found = json.loads(machine.texts()["gpu-report/report.json"])
    assert set(found["sections"]) == {"machine"}
    assert "--engine-binary" in found["skipped"]["middle"]


def test_a_machine_without_a_driver_is_told_in_a_sentence(machine: Machine) -> None:
    state = machine.state.read_text()
    machine.state.unlink()
    try:
        done = machine.report("--only", "machine")
    finally:
        machine.state.write_text(state)
    assert done.returncode == 69
    assert "no NVIDIA driver" in done.stderr
