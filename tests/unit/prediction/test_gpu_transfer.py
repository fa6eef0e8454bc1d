"""A calibration of another GPU is used with this GPU's own overhead, and says so."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.record import Gpu
from harness.prediction.gpu_transfer import DriverOverhead, transferred
from harness.prediction.memory import predict
from harness.serving.driver_overhead import known_overheads, on_this_gpu
from harness.store.store import Store
from harness.units import from_gib
from tests.support.records import OVERHEAD, load, record

HERE = DriverOverhead(
    gpu="NVIDIA A100", overhead_gb=0.5, driver="580.95", engine="llama-server b10434", measured_at="2026-11-24T00:00:00Z"
)


def calibration(*gpus: str) -> Calibration:
    found = fit_record(record(load(8192), load(16384), load(32768)))
    machine = msgspec.structs.replace(found.metadata.machine, gpus=tuple(Gpu(name=gpu) for gpu in gpus))
    return msgspec.structs.replace(found, metadata=msgspec.structs.replace(found.metadata, machine=machine))


@pytest.mark.parametrize(("context", "slots"), [(4096, 1), (20_000, 3), (131_072, 1)])
def test_only_the_driver_s_part_changes(context: int, slots: int) -> None:
    old = calibration("NVIDIA RTX 3090")
    new = transferred(old, HERE)

    moved = predict(new, context, slots).total_bytes - predict(old, context, slots).total_bytes

    assert moved == pytest.approx(from_gib(0.5) - OVERHEAD, abs=4096)
    assert new.metadata.machine.gpus[0].name == "NVIDIA A100"
    assert new.constants.kv_cache_gb_per_10k == old.constants.kv_cache_gb_per_10k
    parts = new.metadata.breakdown_gb
    assert (parts.weights or 0) + (parts.fixed_cache or 0) + (parts.compute or 0) + (parts.overhead or 0) == pytest.approx(
        new.constants.base_vram_gb, abs=2e-6
    )


def test_speeds_of_another_gpu_are_not_claimed() -> None:
    assert transferred(calibration("NVIDIA RTX 3090"), HERE).metadata.performance.decode_tokens_per_s is None


def test_several_gpus_are_left_alone() -> None:
    pair = calibration("NVIDIA RTX 3090", "NVIDIA RTX 3090")

    assert transferred(pair, HERE) is pair


def test_what_was_measured_here_is_used_and_said(tmp_path: Path) -> None:
    (tmp_path / "overheads.json").write_bytes(msgspec.json.encode([HERE]))

    found, said = on_this_gpu(calibration("NVIDIA RTX 3090"), "NVIDIA A100", Store(tmp_path))

    assert found.metadata.breakdown_gb.overhead == 0.5
    assert said is not None
    assert "NVIDIA RTX 3090" in said
    assert "0.50 GiB" in said


def test_without_it_the_other_gpu_s_is_used_with_advice(tmp_path: Path) -> None:
    found, said = on_this_gpu(calibration("NVIDIA RTX 3090"), "NVIDIA A100", Store(tmp_path))

    assert found == calibration("NVIDIA RTX 3090")
    assert said is not None
    assert "--measure-overhead" in said


def test_on_the_same_gpu_nothing_is_said(tmp_path: Path) -> None:
    same = calibration("NVIDIA RTX 3090")

    assert on_this_gpu(same, "NVIDIA RTX 3090", Store(tmp_path)) == (same, None)


def test_a_damaged_file_of_overheads_is_none(tmp_path: Path) -> None:
    (tmp_path / "overheads.json").write_text("[{")

    assert known_overheads(Store(tmp_path)) == {}
