"""docs/how-to/add-an-engine.md, followed to the letter: an engine from one folder and one entry point, beside harness."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_FILE = re.compile(r'^```\w+ title="(?P<name>[^"]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as site-packages has it: the page's files, and the metadata that an installer makes of its pyproject.toml."""
    site = tmp_path_factory.mktemp("site")
    files = {match["name"]: match["text"] for match in _FILE.finditer((ROOT / "docs/how-to/add-an-engine.md").read_text())}
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in named.items())
              for group, named in project["entry-points"].items()]  # fmt: skip
    (metadata / "entry_points.txt").write_text("\n".join(points))
    return site


def harness(site: Path, store: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "HARNESS_STORE": str(store)}
    done = subprocess.run(
        [sys.executable, "-m", "harness", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        check=False,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


def test_an_engine_of_one_folder_and_one_entry_point_is_calibrated_checked_and_fitted(installed: Path, tmp_path: Path) -> None:
    asked = ("bear-32m", "--engine", "toy", "--gpus", "none", "--ctx", "8192,16384,32768", "--no-speed")
    status, done = harness(installed, tmp_path, "calibrate", *asked)
    assert (status, done["errors"]) == (0, [])
    calibration = done["data"]["calibration"]
    assert calibration["id"] == "toy/bear-32m"
    assert Path(done["data"]["artifact"]) == tmp_path / "toy" / "bear-32m.yaml"
    assert calibration["constants"]["kv_cache_gb_per_10k"] == pytest.approx(10_000 / 2**20, abs=1e-6)
    assert calibration["metadata"]["breakdown_gb"]["weights"] == 32 / 1024

    status, checked = harness(installed, tmp_path, "check", "toy/bear-32m", "--ctx", "16384")
    assert (status, checked["data"]["verdict"], checked["data"]["reserve_bytes"]) == (0, "fits", 0)

    status, fitted = harness(installed, tmp_path, "fit", done["data"]["record"])
    assert (status, fitted["data"]["calibration"]) == (0, calibration)

    status, listed = harness(installed, tmp_path, "list")
    assert [one["id"] for one in listed["data"]["calibrations"]] == ["toy/bear-32m"]


def test_without_the_package_its_engine_is_not_there(tmp_path: Path) -> None:
    status, done = harness(tmp_path, tmp_path, "calibrate", "bear-32m", "--engine", "toy", "--gpus", "none")
    assert status == 2
    assert "'toy' is not one of auto, ollama, llama-server, vllm" in done["errors"][0]["message"]
