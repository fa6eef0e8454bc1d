"""Two harnesses, one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import CannotWriteError
from harness.sandboxes.locks import hold


def test_a_hostile_name_stays_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locks"

    with hold(["../../escape", "a\nb"], folder):
        assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(CannotWriteError), hold(["GPU-a"], file / "locks"):
        pass


@pytest.mark.filterwarnings("error")
def test_a_session_without_a_runtime_folder_is_no_reason_for_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with hold(["GPU-test-only"]):
        pass
