"""``harness clean`` on a real daemon: what bears our label, and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.maintain.clean import clean
from harness.ownership import KIND, LABEL, OWNER_PID, OWNER_START, RUN, owner_labels
from tests.support.places import engine_image

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.requires("docker")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def client() -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.from_env()) as opened:
        yield opened


def run(store: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", "clean", "--store", str(store), *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_only_what_is_abandoned_goes_and_only_when_told(client: DockerClient, tmp_path: Path) -> None:
    mine = owner_labels(f"test-{os.getpid()}")
    dead = mine | {OWNER_PID: "999999999", OWNER_START: "1"}
    foreign = {RUN: mine[RUN]}
    containers = {
        word: client.containers.create(engine_image(), ["sleep"], labels=labels)
        for word, labels in (("in-use", mine), ("abandoned", dead), ("foreign", foreign))
    }
    volume = client.volumes.create(labels={LABEL: "1", KIND: "models", RUN: mine[RUN]})
    names = {str(one.name): word for word, one in containers.items()} | {str(volume.name): "kept"}

    def seen() -> dict[str, tuple[str, bool]]:
        items = clean(tmp_path, remove_abandoned=False).items
        return {names[one.name]: (one.state, one.removed) for one in items if one.name in names}

    try:
        found = {"in-use": ("in-use", False), "abandoned": ("abandoned", False), "kept": ("kept", False)}
        assert seen() == found
        done = run(tmp_path, "--yes", "--json")  # another harness's next start would remove the same one
        assert done.returncode == 0, done.stdout
        del found["abandoned"]
        assert seen() == found
        left = {names.get(str(one.name)) for one in client.containers.list(all=True, ignore_removed=True)}
        assert {"in-use", "foreign"} <= left
        assert "abandoned" not in left
        assert f"kept  volume {volume.name}" in run(tmp_path).stdout
    finally:
        for one in client.containers.list(all=True, ignore_removed=True, filters={"label": f"{RUN}={mine[RUN]}"}):
            one.remove(force=True)
        volume.remove()
