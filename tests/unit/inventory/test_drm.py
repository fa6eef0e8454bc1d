"""A run on AMD's or Intel's GPUs: which meter is chosen, what is free for a calibration, and what ``doctor`` says of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.engines.base import Options
from harness.engines.registry import recipe_of
from harness.errors import UnavailableError
from harness.inventory.backend import Backend, choose
from harness.inventory.machine import LocalMachine
from harness.maintain import doctor_drm
from harness.maintain.doctor_drm import drm_findings, sleeping_nvidia
from harness.meters import drm_devices
from harness.model.gpu import LocalGpu
from harness.model.record import Gpu, Machine
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest
from harness.serving.calibration_lookup import choose as select
from harness.serving.check import check
from tests.support.calibrations import made_up, store_of
from tests.support.drm_tree import APU, ARC, CARD, GIB, INTEL_IGPU, Tree

RADEON = LocalGpu(key="", name="AMD Radeon RX 7900 XTX (RADV NAVI31)", total_bytes=24 * GIB, free_bytes=20 * GIB)
IGPU = LocalGpu(key="", name="Radeon 8060S Graphics (RADV GFX1151)", total_bytes=119 * GIB, free_bytes=99 * GIB)
NVIDIA = LocalGpu(key="", name="NVIDIA Test A", total_bytes=24 * GIB, free_bytes=23 * GIB)
SOFTWARE = LocalGpu(key="", name="llvmpipe (LLVM 19.1.7, 256 bits)", total_bytes=4 * GIB, free_bytes=4 * GIB)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """This machine, to all that asks for its GPUs."""
    tree = Tree(tmp_path)
    found = drm_devices.drm_gpus
    monkeypatch.setattr(drm_devices, "drm_gpus", lambda *_: found(tree.sys, tree.proc, lambda *_: [(12 * GIB, 0)]))
    monkeypatch.setattr(LocalMachine, "nvidia", UnavailableError("no NVIDIA driver found"))
    return tree


def chosen(monkeypatch: pytest.MonkeyPatch, **devices: LocalGpu) -> Backend:
    listed = tuple(msgspec.structs.replace(gpu, key=key) for key, gpu in devices.items())
    monkeypatch.setattr("harness.engines.llama_server.recipe.LlamaServer.devices", lambda *_: listed)
    return choose(recipe_of("llama-server"), "process", Options())


def test_a_radeon_is_measured_and_named_by_its_address(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.card()
    choice = chosen(monkeypatch, Vulkan0=RADEON)
    assert (choice.meter, choice.target) == ("drm", "gpu")
    assert choice.gpus == (Gpu(name="AMD GPU 1002:744c", uuid=CARD, memory_gb=24.0, driver="amdgpu"),)


def test_beside_a_card_the_integrated_gpu_is_not_used(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.apu()
    assert chosen(monkeypatch, Vulkan0=IGPU).gpus[0].uuid == APU
    tree.card()
    assert [gpu.uuid for gpu in chosen(monkeypatch, Vulkan0=IGPU, Vulkan1=RADEON).gpus] == [CARD]
    assert [gpu.name for gpu in chosen(monkeypatch, Vulkan0=IGPU, Vulkan1=NVIDIA).gpus] == ["NVIDIA Test A"]


def test_a_software_gpu_is_logged_whatever_else_is_there(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.card()
    assert chosen(monkeypatch, Vulkan0=SOFTWARE).meter == "log"


def test_what_is_free_for_a_calibration_is_what_the_kernel_says(tree: Tree, tmp_path: Path) -> None:
    tree.card(used=4 * GIB)
    gpus = (Gpu(name="AMD GPU 1002:744c", uuid=CARD, memory_gb=24.0, driver="amdgpu"),)
    store = store_of(tmp_path / "s", made_up(machine=Machine(target="gpu", sandbox="process", meter="drm", gpus=gpus)))
    found = select(CheckRequest(model="made-up", context=4096), store, LocalMachine(), CalibrationFilter())
    assert not isinstance(found, str)
    assert (found.available, found.obstacle) == ((20 * GIB,), None)


def test_where_the_kernel_does_not_say_the_engine_s_list_does(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.gpu(ARC, "xe")
    arc = "Intel(R) Arc(tm) B580 Graphics (BMG G21)"
    listed = [LocalGpu(key="Vulkan0", name=arc, total_bytes=12 * GIB, free_bytes=11 * GIB)]
    monkeypatch.setattr("harness.engines.llama_server.recipe.LlamaServer.devices", lambda *_: tuple(listed))
    (gpu,) = LocalMachine().kernel_gpus({})  # type: ignore[misc]
    assert (gpu.free_bytes, gpu.total_bytes) == (11 * GIB, 12 * GIB)
    listed.clear()
    (gpu,) = LocalMachine().kernel_gpus({})  # type: ignore[misc]
    assert gpu.free_bytes is None
    assert "CAP_PERFMON" in str(gpu.why)


def test_doctor_explains_each(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_drm, "drm_gpus", drm_devices.drm_gpus)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert drm_findings(tree.sys, tree.proc) == [], "no such GPU: nothing to say"
    tree.card()
    tree.apu()
    tree.gpu(ARC, "xe", card="card3")
    tree.write(tree.gpu(INTEL_IGPU, "i915", card="card0") / "power" / "runtime_status", "suspended")
    found = {finding.code: finding for finding in drm_findings(tree.sys, tree.proc)}
    assert {code: finding.subject for code, finding in found.items()} == {
        "drm-ok": f"GPU {CARD}",
        "drm-integrated": f"GPU {APU}",
        "drm-free-unknown": f"GPU {ARC}",
        "drm-asleep": f"GPU {INTEL_IGPU}",
        "drm-others-hidden": "other GPU processes",
    }
    assert "CAP_PERFMON" in str(found["drm-free-unknown"].hint)
    assert "power/control" in str(found["drm-asleep"].hint)


def test_an_nvidia_gpu_that_slept_is_said_to_be_woken(tree: Tree) -> None:
    for address, status in (("0000:01:00.0", "suspended"), ("0000:02:00.0", "active")):
        folder = tree.sys / "bus" / "pci" / "devices" / address
        tree.write(folder / "vendor", "0x10de")
        tree.write(folder / "class", "0x030000")
        tree.write(folder / "power" / "runtime_status", status)
    assert [finding.subject for finding in sleeping_nvidia(tree.sys)] == ["GPU 0000:01:00.0"]


def test_on_a_gpu_that_shares_the_machine_s_memory_a_spill_wins_nothing(tree: Tree, tmp_path: Path) -> None:
    tree.write(tree.proc / "meminfo", f"MemAvailable: {3 << 20} kB")
    tree.apu()
    gpus = (Gpu(name="AMD GPU 1002:744c", uuid=APU, driver="amdgpu"),)
    store = store_of(tmp_path / "s", made_up(machine=Machine(target="gpu", sandbox="process", meter="drm", gpus=gpus)))
    (one,) = check([CheckRequest(model="made-up", context=8192)], store, LocalMachine()).models
    assert one.verdict == "offload"
    assert any("take the same memory" in warning for warning in one.warnings)
