"""AMD's and Intel's GPUs by the kernel's files: memory of processes, of devices, and what cannot be read."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from harness.errors import NotFoundError, UntrustedError
from harness.meters.drm import DrmMeter
from harness.meters.drm_devices import Driver, drm_gpus, hidden_processes, matching, read_regions
from harness.model.gpu import LocalGpu
from tests.support.drm_tree import APU, ARC, CARD, GIB, INTEL_IGPU, MIB, Tree, amdgpu, amdgpu_new, i915, xe

ENGINE = frozenset({4711, 4712})


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def meter_of(tree: Tree, *addresses: str) -> DrmMeter:
    return DrmMeter(addresses or [CARD], tree.sys, tree.proc)


@pytest.mark.parametrize("text", [amdgpu, amdgpu_new], ids=["to 6.12", "newer"])
def test_a_card_s_own_memory_is_counted_and_what_it_maps_of_the_host_s_is_not(tree: Tree, text: object) -> None:
    tree.card()
    tree.process(4711, text(1, 8 * GIB, gtt=GIB))  # type: ignore[operator]
    reading = meter_of(tree).read(ENGINE)
    assert (reading.total_bytes, reading.devices, reading.reason) == (8 * GIB, {CARD: 8 * GIB}, None)


def test_a_file_that_is_open_twice_or_shared_with_a_child_counts_once(tree: Tree) -> None:
    tree.card()
    tree.process(4711, amdgpu(1, 8 * GIB), amdgpu(1, 8 * GIB), amdgpu(2, MIB))
    tree.process(4712, amdgpu(1, 8 * GIB))
    assert meter_of(tree).read(ENGINE).total_bytes == 8 * GIB + MIB


def test_clients_of_two_cards_may_have_one_number(tree: Tree) -> None:
    tree.card()
    tree.apu()
    tree.process(4711, amdgpu(1, 3 * GIB), amdgpu(1, 5 * MIB, 7 * MIB, address=APU))
    reading = meter_of(tree, CARD, APU).read(ENGINE)
    assert reading.devices == {CARD: 3 * GIB, APU: 12 * MIB}
    assert meter_of(tree).read(ENGINE).devices == {CARD: 3 * GIB}, "a card that is not the engine's is not read"


def test_on_an_apu_what_is_mapped_of_the_machine_s_memory_is_the_gpu_s(tree: Tree) -> None:
    """As in nvtop #492: a model of 24 GB on a Radeon 890M shows 25 258 000 KiB of GTT and 5 348 KiB of VRAM."""
    tree.apu()
    tree.process(4711, amdgpu(1, 5348 << 10, 25258000 << 10, address=APU))
    assert meter_of(tree, APU).read(ENGINE).total_bytes == (25258000 + 5348) << 10


def test_what_rocm_takes_outside_the_drm_files_is_seen_and_not_twice(tree: Tree) -> None:
    tree.card()
    tree.kfd(5678, location=0x0300)
    tree.process(4711, amdgpu(1, 200 * MIB))
    tree.kfd_holds(4711, 5678, 8 * GIB)
    assert meter_of(tree).read(ENGINE).total_bytes == 8 * GIB
    tree.process(4711, amdgpu(1, 9 * GIB))
    assert meter_of(tree).read(ENGINE).total_bytes == 9 * GIB, "both see the same allocations"


def test_another_user_of_the_gpu_is_named_and_not_counted(tree: Tree) -> None:
    tree.card()
    tree.kfd(5678, location=0x0300)
    tree.process(4711, amdgpu(1, 8 * GIB))
    tree.process(99, amdgpu(7, 300 * MIB))
    tree.process(98, amdgpu(8, 0))
    tree.locked(97)
    tree.kfd_holds(97, 5678, GIB)
    reading = meter_of(tree).read(ENGINE)
    assert (reading.total_bytes, reading.other_processes) == (8 * GIB, {97: GIB, 99: 300 * MIB})


def test_intel_s_card_and_its_integrated_gpus(tree: Tree) -> None:
    tree.gpu(ARC, "xe", tile0__physical_vram_size_bytes=12 * GIB)
    tree.gpu(INTEL_IGPU, "i915", card="card0")
    tree.process(4711, xe(3, 6 * GIB), i915(1, 2 * GIB))
    assert meter_of(tree, ARC).read(ENGINE).total_bytes == 6 * GIB
    assert meter_of(tree, INTEL_IGPU).read(ENGINE).total_bytes == 2 * GIB


def test_xe_s_integrated_gpu_has_all_in_its_tables(tree: Tree) -> None:
    tree.gpu(INTEL_IGPU, "xe", card="card0")
    tree.process(4711, xe(3, 0, gtt=2 * GIB, address=INTEL_IGPU))
    assert meter_of(tree, INTEL_IGPU).read(ENGINE).total_bytes == 2 * GIB


def test_nothing_on_the_gpu_is_no_reading_and_not_zero(tree: Tree) -> None:
    tree.card()
    tree.process(4711, amdgpu(1, 0))
    for pids, reason in ((ENGINE, "holds memory"), (frozenset({1}), "not visible"), (frozenset[int](), "no processes")):
        reading = meter_of(tree).read(pids)
        assert reading.total_bytes is None
        assert reason in (reading.reason or "")


def test_a_part_that_may_not_be_read_leaves_no_partial_sum(tree: Tree) -> None:
    tree.card()
    tree.process(4711, amdgpu(1, 8 * GIB))
    tree.locked(4712)
    reading = meter_of(tree).read(ENGINE)
    assert reading.total_bytes is None
    assert "start harness as root" in (reading.reason or "")


def test_without_figures_by_process_the_card_s_own_rise_is_named_as_such(tree: Tree) -> None:
    device = tree.card(used=GIB)
    meter = meter_of(tree)
    assert meter.take_baseline().devices == {CARD: GIB}
    tree.locked(4711)
    tree.write(device / "mem_info_vram_used", 5 * GIB)
    reading = meter.read(ENGINE)
    assert (reading.total_bytes, reading.basis) == (4 * GIB, "device-delta")
    assert meter.peek() == 4 * GIB
    tree.process(99, amdgpu(7, 300 * MIB))
    assert meter.read(ENGINE).total_bytes is None, "beside others the rise cannot be attributed"


def test_a_full_card_whose_driver_moves_memory_to_the_host_is_no_reading(tree: Tree) -> None:
    tree.card()
    tree.process(4711, amdgpu(1, 16 * MIB, gtt=15 * GIB, evicted=15 * GIB))
    reading = meter_of(tree).read(ENGINE)
    assert reading.total_bytes is None
    assert "GPU is full" in (reading.reason or "")


def test_a_gpu_that_sleeps_is_not_woken(tree: Tree) -> None:
    device = tree.card()
    tree.process(4711, amdgpu(1, 8 * GIB))
    meter = meter_of(tree)
    tree.write(device / "power" / "runtime_status", "suspended")
    (tree.proc / "4711" / "fdinfo" / "4").unlink()  # reading it would fail
    reading = meter.read(ENGINE)
    assert (reading.total_bytes, reading.listed) == (None, False)
    assert "power/control" in (reading.reason or "")
    assert meter.occupancy().processes == {}
    (gpu,) = drm_gpus(tree.sys, tree.proc)
    assert (gpu.asleep, gpu.free_bytes, gpu.total_bytes) == (True, None, 24 * GIB)


def test_a_sleeping_card_of_intel_s_is_not_opened(tree: Tree) -> None:
    device = tree.gpu(ARC, "xe", tile0__physical_vram_size_bytes=12 * GIB)
    tree.write(device / "power" / "runtime_status", "suspended")
    opened: list[Path] = []
    drm_gpus(tree.sys, tree.proc, lambda node, _: opened.append(node) or [])  # type: ignore[func-returns-value]
    assert not opened


@pytest.mark.parametrize("happens", ["reloaded", "gone"])
def test_a_driver_that_is_loaded_anew_voids_the_run(tree: Tree, happens: str) -> None:
    tree.card()
    tree.process(4711, amdgpu(1, 8 * GIB))
    meter = meter_of(tree)
    tree.reload("card1")
    if happens == "gone":
        (tree.sys / "class" / "drm" / "card1").rename(tree.sys / "class" / "drm" / "was")
    with pytest.raises(UntrustedError) as caught:
        meter.read(ENGINE)
    assert caught.value.code == "gpu-lost"


def test_a_gpu_that_is_not_there(tree: Tree) -> None:
    tree.card()
    tree.gpu("0000:01:00.0", "nvidia", card="card7")
    assert [gpu.key for gpu in drm_gpus(tree.sys, tree.proc)] == [CARD]
    with pytest.raises(NotFoundError):
        meter_of(tree, "0000:01:00.0")


def test_what_is_free_on_a_card_and_on_an_apu(tree: Tree) -> None:
    tree.card(used=4 * GIB)
    tree.apu(used=GIB)
    card, apu = drm_gpus(tree.sys, tree.proc)
    assert (card.shared, card.total_bytes, card.free_bytes, card.name) == (False, 24 * GIB, 20 * GIB, "AMD GPU 1002:744c")
    assert (apu.shared, apu.total_bytes) == (True, 120 * GIB + 512 * MIB)
    assert apu.free_bytes == 100 * GIB + 448 * MIB, "119 GiB of the GTT are free, and the machine has 100 left"


@pytest.mark.parametrize(("vram", "gtt", "integrated"), [(GIB // 2, 16 * GIB, True), (24 * GIB, 64 * GIB, False)])
def test_a_kernel_that_shows_no_load_is_told_by_the_sizes(tree: Tree, vram: int, gtt: int, integrated: bool) -> None:
    tree.gpu(CARD, mem_info_vram_total=vram, mem_info_vram_used=0, mem_info_gtt_total=gtt, mem_info_gtt_used=0)
    assert drm_gpus(tree.sys, tree.proc)[0].shared is integrated


def test_an_apu_without_memory_of_its_own_has_no_such_files(tree: Tree) -> None:
    tree.gpu(APU, mem_info_gtt_total=120 * GIB, mem_info_gtt_used=GIB, gpu_busy_percent=1)
    tree.process(4711, amdgpu(1, 0, 7 * GIB, address=APU))
    (gpu,) = drm_gpus(tree.sys, tree.proc)
    assert (gpu.total_bytes, gpu.free_bytes) == (120 * GIB, 100 * GIB)
    meter = meter_of(tree, APU)
    assert meter.take_baseline().devices == {APU: GIB}


@pytest.mark.parametrize(
    ("driver", "head", "regions"),
    [
        ("xe", struct.pack("<II", 2, 0), [(0, 1, 4096, 64 * GIB, 0, 0, 0), (1, 0, 65536, 12 * GIB, 3 * GIB, 12 * GIB, 0)]),
        ("i915", struct.pack("<IIII", 2, 0, 0, 0), [(0, 0, 0, 64 * GIB, 64 * GIB), (1, 0, 0, 12 * GIB, 9 * GIB)]),
    ],
)
def test_a_driver_s_list_of_regions(driver: Driver, head: bytes, regions: list[tuple[int, ...]]) -> None:
    layout = "<HHIQQQQ48x" if driver == "xe" else "<HHIQQ64x"
    answer = head + b"".join(struct.pack(layout, *region) for region in regions)
    assert read_regions(answer, driver) == [(12 * GIB, 3 * GIB)]


@pytest.mark.parametrize("driver", ["xe", "i915"])
def test_what_a_driver_tells_root_alone_is_unknown_to_others(tree: Tree, driver: str) -> None:
    """With xe 0 is used, with i915 all is unallocated: include/uapi/drm/xe_drm.h and i915_drm.h."""
    tree.gpu(ARC, driver)
    (gpu,) = drm_gpus(tree.sys, tree.proc, lambda *_: [(12 * GIB, 0)])
    assert (gpu.total_bytes, gpu.free_bytes) == (12 * GIB, None)
    assert "CAP_PERFMON" in (gpu.why or "")
    (gpu,) = drm_gpus(tree.sys, tree.proc, lambda *_: [(12 * GIB, 3 * GIB)])
    assert (gpu.free_bytes, gpu.why) == (9 * GIB, None)


def test_a_node_that_may_not_be_opened_is_said(tree: Tree) -> None:
    tree.gpu(ARC, "xe", tile0__physical_vram_size_bytes=12 * GIB)

    def refused(node: Path, driver: Driver) -> list[tuple[int, int]]:
        raise PermissionError(13, "Permission denied")

    (gpu,) = drm_gpus(tree.sys, tree.proc, refused)
    assert (gpu.total_bytes, gpu.free_bytes) == (12 * GIB, None)
    assert "Permission denied" in (gpu.why or "")


def test_an_engine_s_devices_are_found_by_vendor_and_size(tree: Tree) -> None:
    tree.card()
    tree.apu()
    tree.gpu(ARC, "xe", card="card3", tile0__physical_vram_size_bytes=12 * GIB)
    gpus = drm_gpus(tree.sys, tree.proc, lambda *_: [])

    def found(*listed: tuple[str, int]) -> list[str]:
        devices = [LocalGpu(key="Vulkan0", name=title, total_bytes=size * GIB) for title, size in listed]
        return [gpu.key for gpu in matching(devices, gpus)]

    arc, radeon = ("Intel(R) Arc(tm) B580 Graphics (BMG G21)", 12), ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 24)
    assert found(arc, radeon) == [ARC, CARD]
    assert found(("Radeon 8060S Graphics (RADV GFX1151)", 119)) == [APU]
    assert found(("llvmpipe (LLVM 19.1.7, 256 bits)", 4)) == []
    assert found(arc, radeon, arc) == [], "one that is not there leaves nothing"


@pytest.mark.parametrize("options", ["rw,relatime,hidepid=2", "rw,hidepid=invisible", "rw,hidepid=ptraceable"])
def test_a_proc_that_hides_processes_is_said(tree: Tree, options: str) -> None:
    tree.write(tree.proc / "self" / "mounts", f"overlay / overlay rw 0 0\nproc /proc proc {options} 0 0")
    assert "hidepid" in (hidden_processes(tree.proc) or "")


def test_a_proc_that_hides_nothing_hides_from_users_alone(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.write(tree.proc / "self" / "mounts", "proc /proc proc rw,hidepid=off 0 0")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert hidden_processes(tree.proc) is None
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root alone" in (hidden_processes(tree.proc) or "")
