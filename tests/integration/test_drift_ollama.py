"""An Ollama upgrade acted out: two images of the stand-in, from ``recalibrate --stale`` to the text of a pull request."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from harness.cli.main import cli
from tests.support.images import ollama_image
from tests.support.ollama import registry

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.requires("docker", "embedded")
TAGS = ("harness-test/ollama:drill-0.33.0", "harness-test/ollama:drill-0.34.0")


@pytest.fixture
def client() -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.from_env()) as opened:
        yield opened


@pytest.fixture
def here(client: DockerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project that pins Ollama 0.33.0, with 0.34.0 at hand, whose runner takes 48 MiB more."""
    volume = f"harness-test-{uuid.uuid4().hex}"
    monkeypatch.setattr("harness.engines.ollama.VOLUME", volume)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "catalog.yaml").write_text("models: {}\n")
    pin(tmp_path, TAGS[0])
    made = [
        ollama_image(client, registry(), STANDIN_VERSION="0.33.0"),
        ollama_image(client, registry(), STANDIN_VERSION="0.34.0", STANDIN_HOLD="48"),
    ]
    for reference, tag in zip(made, TAGS, strict=True):
        client.images.get(reference).tag(*tag.split(":"))
    yield tmp_path
    for tag in TAGS:
        client.images.remove(tag)
    with contextlib.suppress(Exception):
        client.volumes.get(volume).remove()


def pin(folder: Path, tag: str) -> None:
    (folder / "images" / "pins.yaml").write_text(f"ollama: '{tag}'\n")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def answer(*arguments: str) -> Any:
    done = call(*arguments, "--json")
    document = json.loads(done.stdout)
    assert document["exit_code"] == 0, document
    return document["data"]


def test_an_upgrade_goes_from_stale_to_a_text_to_decide_from(here: Path) -> None:
    measure = ("calibrate", "tiny", "--engine", "ollama", "--gpus", "none", "--no-speed", "--ctx", "1024,2048,4096")
    answer(*measure)
    (same,) = answer("recalibrate", "--stale", "--dry-run")["calibrations"]
    assert (same["stale"], same["reasons"]) == (False, [])
    assert set(same["unknown"]) <= {"model digest"}  # where the daemon's folders may not be read

    pin(here, TAGS[1])
    (stale,) = answer("recalibrate", "--stale", "--dry-run")["calibrations"]
    assert stale["reasons"] == [{"name": "image", "old": TAGS[0], "new": TAGS[1]}]

    shutil.copytree(here / "models/calibrations", here / "before")
    (done,) = answer("recalibrate", "--stale")["calibrations"]
    assert done["status"] == "done"
    assert answer("recalibrate", "--stale")["calibrations"] == []

    told = call("diff", "before", "models/calibrations", "--markdown")
    assert told.exit_code == 6
    lines = told.stdout.splitlines()
    assert lines[0] == "**1 of 1 calibrations moved beyond the measurement error**"
    assert any(line.startswith("Since: engine 0.33.0 → 0.34.0; image ") for line in lines)
    moved = {line.split("|")[1].strip().replace("\\", "") for line in lines if line.startswith("| ") and "±" in line}
    assert moved == {"base_vram_gb", "overhead_gb"}
    assert any(line.startswith("- memory at 4,096 tokens: ") for line in lines)
