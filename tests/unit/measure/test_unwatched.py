"""The engine's log names the GPU that it uses: a meter that reads another one measures nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.errors import UntrustedError
from harness.logs.pci import device_addresses
from harness.measure.interference import refuse_unwatched
from harness.model.record import Gpu, Machine
from tests.support.records import load

WATCHED, OTHER = "0000:03:00.0", "0000:C3:00.0"


def line(device: str, title: str, address: str) -> str:
    return f"llama_prepare_model_devices: using device {device} ({title}) ({address}) - 24000 MiB free\n"


def test_addresses_are_read_and_devices_without_one_are_left_out() -> None:
    log = line("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", OTHER) + line("RPC0", "127.0.0.1:50195", "unknown id")
    assert device_addresses(log.encode()) == {"Vulkan0": OTHER.lower()}


@pytest.mark.parametrize(
    ("meter", "address", "refused"),
    [("drm", WATCHED, False), ("drm", OTHER, True), ("drm", "unknown id", False), ("log", OTHER, False)],
)
def test_another_gpu_than_the_meter_s_ends_the_run(tmp_path: Path, meter: str, address: str, refused: bool) -> None:
    before = line("Vulkan0", "another load", OTHER)
    (tmp_path / "engine-0.log").write_text(before + line("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", address))
    gpus = (Gpu(name="AMD GPU 1002:744c", uuid=WATCHED),)
    machine = Machine(target="gpu", sandbox="process", meter=meter, gpus=gpus)  # type: ignore[arg-type]
    one = msgspec.structs.replace(load(8192), log="engine-0.log", log_start=len(before), log_end=None)
    if not refused:
        refuse_unwatched(one, machine, tmp_path)
        return
    with pytest.raises(UntrustedError) as caught:
        refuse_unwatched(one, machine, tmp_path)
    assert (caught.value.code, OTHER.lower() in caught.value.message) == ("other-gpu", True)


def test_a_real_log_has_the_kernel_s_address() -> None:
    log = Path(__file__).parents[2] / "golden" / "llama-server" / "b11434-cuda-h100" / "full-8192.log"
    assert device_addresses(log.read_bytes()) == {"CUDA0": "0000:00:06.0"}
