"""Stores of several machines become one, and nothing is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.errors import NotFoundError
from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.model.record import Gpu, Record
from harness.store.store import Store, read_record
from harness.sweep.merge import merge
from harness.units import MIB
from tests.support.records import OVERHEAD, load, record


def measured(*, gpu: str = "RTX 3090", day: int = 24, overhead: int = OVERHEAD, run: str | None = None) -> Record:
    base = record(*(load(context, overhead=overhead) for context in (8192, 16384, 32768)))
    machine = msgspec.structs.replace(base.machine, gpus=(Gpu(name=gpu),))
    name = run or f"202611{day}T000000Z-{gpu.replace(' ', '')}"
    return msgspec.structs.replace(base, run=name, started_at=f"2026-11-{day}T00:00:00Z", machine=machine)


def shelf(root: Path, *records: Record) -> Store:
    store = Store(root)
    for one in records:
        store.write_record(one)
        store.write(store.path_of("llama-server", "made-up"), fit_record(one))
    return store


def merged(store: Store, *others: Store, **options: Any) -> list[str]:
    return [one.action for one in merge(store, [other.root for other in others], **options)]


def held(store: Store) -> dict[str, Calibration]:
    return {path.name: store.read(path) for path in store.paths()}


def runs(store: Store) -> set[str]:
    return {path.name for path in store.runs()}


def test_what_is_not_here_is_added_with_its_run(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here"), shelf(tmp_path / "there", measured())

    assert merged(here, there) == ["added"]
    assert held(here) == held(there)
    assert runs(here) == runs(there)
    assert merged(here, there) == ["same"]


def test_runs_are_copied_to_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Store(tmp_path / "here"), shelf(tmp_path / "there", measured())

    def no_locks(_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("harness.store.run_folder.lock", no_locks)
    assert merged(here, there) == ["added"]
    assert runs(here) == runs(there)


def test_another_gpu_becomes_a_variant(tmp_path: Path) -> None:
    here, there = shelf(tmp_path / "here", measured()), shelf(tmp_path / "there", measured(gpu="A100 80GB"))

    assert merged(here, there) == ["variant"]

    gpus = {name: calibration.metadata.machine.gpus[0].name for name, calibration in held(here).items()}
    assert sorted(gpus.values()) == ["A100 80GB", "RTX 3090"]
    assert gpus["made-up.yaml"] == "RTX 3090"
    assert merged(here, there) == ["same"]


@pytest.mark.parametrize(("day", "action"), [(23, "kept"), (25, "replaced")])
def test_of_two_that_agree_the_newer_one_stays(tmp_path: Path, day: int, action: str) -> None:
    here, there = shelf(tmp_path / "here", measured()), shelf(tmp_path / "there", measured(day=day))

    assert merged(here, there) == [action]
    assert held(here)["made-up.yaml"].metadata.calibrated_at == f"2026-11-{max(day, 24)}T00:00:00Z"
    assert len(runs(here)) == 2


def test_two_that_disagree_are_a_conflict_that_overwrites_nothing(tmp_path: Path) -> None:
    here, there = (
        shelf(tmp_path / "here", measured()),
        shelf(tmp_path / "there", measured(day=25, overhead=OVERHEAD + 90 * MIB)),
    )
    before = held(here)

    (conflict,) = merge(here, [there.root])

    assert conflict.action == "conflict"
    assert conflict.drift is not None
    assert "constants.base_vram_gb" in {figure.name for figure in conflict.drift.moved} | {
        f"constants.{figure.name}" for figure in conflict.drift.moved
    }
    assert held(here) == before
    assert len(runs(here)) == 2
    assert merged(here, there, newer=True) == ["replaced"]
    assert held(here) == held(there)


def test_two_runs_of_one_name_are_both_kept(tmp_path: Path) -> None:
    here = shelf(tmp_path / "here", measured(run="one"))
    there = shelf(tmp_path / "there", measured(run="one", gpu="A100 80GB"))

    merged(here, there)

    assert len(runs(here)) == 2
    for calibration in held(here).values():
        found = read_record(here.run_folder(str(calibration.metadata.run)))
        assert found.machine.gpus == calibration.metadata.machine.gpus


def test_a_damaged_file_is_named_and_stops_nothing(tmp_path: Path) -> None:
    there = shelf(tmp_path / "there", measured())
    (there.root / "llama-server" / "broken.yaml").write_text("constants: [")

    assert sorted(merged(Store(tmp_path / "here"), there)) == ["added", "unreadable"]


def test_a_folder_without_calibrations_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        merged(Store(tmp_path / "here"), Store(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no calibrations"):
        merged(Store(tmp_path / "here"), Store(tmp_path / "empty"))


def test_a_run_brings_its_own_files_and_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    secret = tmp_path / "shadow"
    secret.write_text("root:x")
    there = shelf(tmp_path / "there", measured(run="one"), measured(run="two"))
    (there.run_folder("one") / "engine-1.log").symlink_to(secret)
    (there.run_folder("one") / "engine-2.log").write_text("a line")
    (there.run_folder("one") / "evil.sh").write_text("rm -rf")
    os.mkfifo(there.run_folder("one") / "engine-3.log")
    (there.run_folder("two") / "record.json").unlink()
    (there.run_folder("two") / "record.json").symlink_to(secret)
    (there.root / "runs" / "three").symlink_to(tmp_path)
    here = Store(tmp_path / "here")

    assert sorted(merged(here, there)) == ["added", "unreadable"]
    assert sorted(path.name for path in here.run_folder("one").iterdir()) == ["engine-2.log", "record.json"]
    assert (here.run_folder("one") / "engine-2.log").stat().st_mode & 0o777 == 0o600
    assert runs(here) == {"one"}
