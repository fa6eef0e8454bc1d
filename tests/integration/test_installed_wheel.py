"""What a wheel of harness brings."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def test_an_installed_harness_brings_its_data(tmp_path: Path) -> None:
    """Catalog, pins, the report's page and the reaper's program are found without a checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())

    assert {"harness/report/assets/page.js", "harness/sandboxes/reaper_main.py", "harness/py.typed"} <= held
    assert {"harness/data/models/catalog.yaml", "harness/data/images/pins.yaml"} <= held
