"""``harness fit`` of every golden record gives the artifact that stands beside it, byte for byte.

Three records are of real engines on a CPU, with their logs, which are read again; those below ``made-up`` are of models whose
memory is known, and reach what no CPU does: a GPU's meter, dry runs, bands of a batch, windows, loads that do not fit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import Command

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDS = sorted(path.parent for path in GOLDEN.rglob("record.json"))


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: str(folder.relative_to(GOLDEN)))
def test_an_artifact_follows_from_its_record_to_the_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (expected,) = folder.glob("*.yaml")

    done = Command(tmp_path, monkeypatch, capfd)("fit", str(folder), "-o", str(tmp_path / "again.yaml"))

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.yaml").read_text() == expected.read_text()
