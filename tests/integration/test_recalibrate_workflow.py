"""An Ollama upgrade acted out: the scripts of ``recalibrate.yml``, from what is stale to the text of a pull request.

Two images of the stand-in are the two releases. What GitHub's own actions do (check out, keep files, open the pull request) is
done by hand here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.composite import Action, commands
from tests.support.images import ollama_image
from tests.support.ollama import registry

if TYPE_CHECKING:
    from docker import DockerClient

ROOT = Path(__file__).parents[2]
REPOSITORY = "harness-test/ollama"
OLD, NEW = "drill-0.33.0", "drill-0.34.0"
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/recalibrate.yml").read_text())
_EXPRESSION = re.compile(r"\$\{\{ *(.*?) *\}\}")


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


class Runner:
    """Runs the ``run`` steps of a job in a fresh clone, as ``bash -e`` with the environment that the workflow gives them."""

    def __init__(self, folder: Path, origin: Path, contexts: dict[str, str]) -> None:
        self.folder, self.origin, self.temp = folder, origin, folder / "temp"
        self.contexts = {**contexts, "runner.temp": str(self.temp)}
        script(folder / "bin/gh", f'[ "$1" = pr ] || exit 0\nprintf "%s\\n" "$@" > {folder}/gh; cp "$8" {folder}/body')
        # A tag of this machine's own is in no registry.
        docker = shutil.which("docker")
        script(folder / "bin/docker", f'[ "$1" != pull ] || exit 1\nexec {docker} "$@"' if docker else "exit 1")

    def job(self, name: str, before: Path | None = None) -> Path:
        """Run a job; the folder that it leaves. ``before`` is what is downloaded into ``out``."""
        here = self.folder / name
        git(self.folder, "clone", "--quiet", str(self.origin), str(here))
        script(here / ".venv/bin/harness", f'PYTHONPATH={ROOT} exec {sys.executable} -m harness "$@"')
        if before is not None:
            shutil.copytree(before, here / "out")
        for step in WORKFLOW["jobs"][name]["steps"]:
            if "run" in step and step["run"] != "make setup" and self.wanted(step):
                self.run(here, step)
        return here

    def wanted(self, step: dict[str, Any]) -> bool:
        return step.get("if") != "inputs.ollama != ''" or self.contexts["inputs.ollama"] != ""

    def run(self, here: Path, step: dict[str, Any]) -> None:
        assert not _EXPRESSION.search(step["run"]), "an expression in a script can be made to run anything"
        given = {
            key: _EXPRESSION.sub(lambda match: self.contexts[match[1]], value) for key, value in step.get("env", {}).items()
        }
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HARNESS_")},
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(self.folder / "output"),
            "GITHUB_STEP_SUMMARY": str(self.folder / "summary"),
            "GITHUB_RUN_ID": "7",
            "GITHUB_RUN_ATTEMPT": "1",
            **given,
        }
        done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=here, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def client() -> Iterator[DockerClient]:
    import docker

    with contextlib.closing(docker.from_env()) as opened:
        yield opened


@pytest.fixture
def origin(client: DockerClient, tmp_path: Path) -> Iterator[Path]:
    """A project that pins Ollama 0.33.0 and was calibrated with it; 0.34.0, whose runner takes 48 MiB more, is at hand."""
    made = [
        ollama_image(client, registry()),  # it says that it is 0.33.0
        ollama_image(client, registry(), STANDIN_VERSION="0.34.0", STANDIN_HOLD="48"),
    ]
    for reference, tag in zip(made, (OLD, NEW), strict=True):
        client.images.get(reference).tag(REPOSITORY, tag)
    project = tmp_path / "project"
    (project / "images").mkdir(parents=True)
    (project / "images/pins.yaml").write_text(f"ollama: '{REPOSITORY}:{OLD}'\n")
    (project / "models").mkdir()
    (project / "models/catalog.yaml").write_text("models: {}\n")
    (project / ".gitignore").write_text(
        "/models/calibrations/runs/\n.*.lock\n/.venv/\n/out/\n/drift.md\n/list.json\n/image.json\n"
    )
    shutil.copy(registry() / "tiny.gguf", project)
    measure = ("calibrate", "tiny.gguf", "--engine", "ollama", "--gpus", "none", "--no-speed", "--ctx", "1024,2048,4096")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "harness", *measure], cwd=project, env=env, check=True, capture_output=True)
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "calibrated")
    git(tmp_path, "clone", "--quiet", "--bare", str(project), "origin")
    yield tmp_path / "origin"
    for tag in (OLD, NEW):
        client.images.remove(f"{REPOSITORY}:{tag}")


@pytest.mark.slow
@pytest.mark.requires("docker", "embedded")
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_an_upgrade_becomes_a_pull_request_to_decide_from(origin: Path, tmp_path: Path) -> None:
    ids = ["ollama/tiny"]
    runner = Runner(tmp_path, origin, {"inputs.ollama": NEW, "matrix.id": ids[0], "github.token": "none"})
    runner.job("plan")
    assert (tmp_path / "output").read_text() == f"ids={json.dumps(ids)}\n"
    measured = runner.job("measure")
    assert len(list((measured / "out/models/calibrations/runs").glob("*/record.json"))) == 1
    composed = runner.job("compose", before=measured / "out")
    shutil.copytree(composed / "proposal", runner.temp / "proposal")
    runner.job("propose")

    arguments = (tmp_path / "gh").read_text().splitlines()
    assert arguments[:4] == ["pr", "create", "--head", "recalibrate/7-1"]
    assert arguments[5] == "Recalibrate: 1 of 1 calibrations that were measured again moved beyond the measurement error"
    changed = git(origin, "diff", "--name-only", "main", "recalibrate/7-1").split()
    assert changed == ["images/pins.yaml", "models/calibrations/ollama/tiny.yaml"]
    assert f"{REPOSITORY}:{NEW}" in git(origin, "show", "recalibrate/7-1:images/pins.yaml")

    body = (tmp_path / "body").read_text()
    assert body == (composed / "proposal/drift.md").read_text() == (tmp_path / "summary").read_text()
    lines = body.splitlines()
    assert any(line.startswith("Since: engine 0.33.0 → 0.34.0; image ") for line in lines)
    assert any(line.startswith("- memory at 4,096 tokens: ") for line in lines)
    moved = {line.split("|")[1].strip().replace("\\", "") for line in lines if line.startswith("| ") and "±" in line}
    assert moved == {"base", "overhead"}

    # Once that is merged, nothing is stale: nothing is measured, and nobody is asked.
    git(origin, "update-ref", "refs/heads/main", "recalibrate/7-1")
    (tmp_path / "gh").unlink()
    for name in ("measure", "compose", "propose", "temp"):
        shutil.rmtree(tmp_path / name)
    runner.contexts["inputs.ollama"] = ""
    again = runner.job("measure")
    assert not (again / "out/models").exists()
    composed = runner.job("compose", before=again / "out")
    shutil.copytree(composed / "proposal", runner.temp / "proposal")
    runner.job("propose")
    assert not (tmp_path / "gh").exists()


@pytest.mark.slow
@pytest.mark.requires("docker", "embedded")
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_pull_request_that_raises_the_image_is_measured_and_answered(origin: Path, tmp_path: Path) -> None:
    """The composite action on the merge of such a pull request: real containers, one comment."""
    here = tmp_path / "pull"
    git(tmp_path, "clone", "--quiet", str(origin), str(here))
    (here / "images/pins.yaml").write_text(f"ollama: '{REPOSITORY}:{NEW}'\n")
    git(here, "commit", "--quiet", "--all", "--message", "bump")
    script(tmp_path / "harness", f'PYTHONPATH={ROOT} exec {sys.executable} -m harness "$@"')
    calibration = yaml.safe_load((here / "models/calibrations/ollama/tiny.yaml").read_text())
    needed = round(calibration["constants"]["base_vram_gb"] * 1024) + 24
    given = {"program": str(tmp_path / "harness"), "run": "measure", "models": "tiny@2048", "available": f"{needed}MiB"}
    pull = {"pull_request": {"number": 7, "head": {"repo": {"full_name": "team/models"}}}}
    done = Action(ROOT, tmp_path).run(here, given, pull)

    assert done.returncode == 0, done.stdout + done.stderr
    text = (here / "harness-comment.md").read_text()
    assert f"ollama {REPOSITORY}:{OLD} → {REPOSITORY}:{NEW}" in text
    assert "1 of 1 calibrations that were measured again moved beyond the measurement error" in text
    assert "**fits → offload**" in text
    assert commands(done.stdout) == [
        ("warning", "models/calibrations/ollama/tiny.yaml", "tiny@2048: fits → offload"),
    ]  # fmt: skip


def test_a_tag_that_is_none_stops_the_run(tmp_path: Path) -> None:
    (step,) = [step for step in WORKFLOW["jobs"]["measure"]["steps"] if step.get("if") == "inputs.ollama != ''"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.33.0'\nvllm: 'vllm/vllm-openai:v1'\n")

    def pin(tag: str) -> int:
        env = {**os.environ, "TAG": tag}
        return subprocess.run(
            ["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=env, capture_output=True, check=False
        ).returncode

    for tag in ("0.1|e touch /tmp/x", "$(id)", "0.1'\nvllm: 'x", "-x", ""):
        assert pin(tag) == 1, tag
    assert pin("0.34.0-rc1") == 0
    pins = (tmp_path / "images/pins.yaml").read_text()
    assert pins == "ollama: 'ollama/ollama:0.34.0-rc1'\nvllm: 'vllm/vllm-openai:v1'\n"


def test_the_job_for_gitlab_is_yaml_and_shell() -> None:
    page = (ROOT / "docs/how-to/recalibrate.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for line in yaml.safe_load(block)["recalibrate"]["script"]:
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_actions_are_pinned_and_may_do_only_what_they_need() -> None:
    assert WORKFLOW["permissions"] == {}
    for name, job in WORKFLOW["jobs"].items():
        wanted = {"contents": "write", "pull-requests": "write"} if name == "propose" else {"contents": "read"}
        assert job["permissions"] == wanted
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}")), step


@pytest.mark.requires("actionlint")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
