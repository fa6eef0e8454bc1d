"""The composite action as a runner runs it: a guard without a GPU, and the answer to a pull request that upgrades an engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.calibrations import made_up, store_of
from tests.support.composite import Action, commands

ROOT = Path(__file__).parents[2]
PULL = {"pull_request": {"number": 7, "head": {"repo": {"full_name": "team/models"}}}}
FORK = {"pull_request": {"number": 7, "head": {"repo": {"full_name": "other/models"}}}}

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def action(tmp_path: Path) -> Action:
    return Action(ROOT, tmp_path)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with calibrations and pins, and a pull request's merge that upgrades two engines."""
    here = tmp_path / "project"
    (here / "images").mkdir(parents=True)
    store_of(here / "models/calibrations", made_up())
    (here / "models/catalog.yaml").write_text("models: {}\n")
    (here / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.33.0'\nvllm: 'vllm/vllm-openai:v0.27.1'\n")
    git(here, "init", "--quiet")
    git(here, "add", ".")
    git(here, "commit", "--quiet", "--message", "calibrated")
    (here / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.34.0'\nvllm: 'vllm/vllm-openai:v0.28.0'\n")
    git(here, "commit", "--quiet", "--all", "--message", "bump")
    return here


@pytest.fixture
def program(tmp_path: Path) -> str:
    """harness; a recalibration is acted out: the next engine takes 2 GiB more, and another calibration fails."""
    code = (
        "import json, msgspec\nfrom pathlib import Path\nfrom harness.store.store import Store\n"
        "s = Store(Path('models/calibrations'))\np = s.path_of('llama-server', 'made-up')\nc = s.read(p)\nm = c.metadata\n"
        "b = [msgspec.structs.replace(x, base_vram_gb=x.base_vram_gb + 2) for x in m.bands]\n"
        "k = msgspec.structs.replace(c.constants, base_vram_gb=c.constants.base_vram_gb + 2)\n"
        "o = msgspec.structs.replace(m.breakdown_gb, overhead=m.breakdown_gb.overhead + 2)\n"
        "e = msgspec.structs.replace(m.engine, version='b2')\n"
        "m = msgspec.structs.replace(m, bands=tuple(b), breakdown_gb=o, engine=e, run='later')\n"
        "s.write(p, msgspec.structs.replace(c, constants=k, metadata=m))\n"
        "failed = {'calibration': 'vllm/x', 'error': {'code': 'busy', 'message': 'the GPU is busy'}}\n"
        "print(json.dumps({'data': {'calibrations': [failed]}, 'errors': [{'message': 'the GPU is busy'}]}))\n"
    )
    python = f"PYTHONPATH={ROOT} exec {sys.executable}"
    (tmp_path / "recalibrate.py").write_text(code)
    return script(
        tmp_path / "bin/harness",
        f'if [ "$1" = recalibrate ]; then {python} {tmp_path}/recalibrate.py; fi\n{python} -m harness "$@"',
    )


def test_the_guard_fails_a_pull_request_that_would_be_offloaded(action: Action, project: Path, program: str) -> None:
    given = {"program": program, "models": "made-up@8192", "available": "7GiB"}
    fits = action.run(project, given)
    assert (fits.returncode, commands(fits.stdout)) == (0, [])
    assert "| made-up | 8,192 | fits: needs 4.60 GiB, 7.00 GiB are there |" in (action.temp / "summary").read_text()

    raised = action.run(project, {**given, "models": "made-up@8192 made-up@131072"})
    assert raised.returncode == 3
    ((level, file, text),) = commands(raised.stdout)
    assert (level, file) == ("error", "models/calibrations/llama-server/made-up.yaml")
    assert text.startswith("CPU offload likely at 131,072 tokens: needs 8.00 GiB, 7.00 GiB are there, ")

    added = action.run(project, {**given, "models": "made-up@8192 new-model@4096"})
    assert added.returncode == 4
    assert "new-model has no calibration" in added.stdout


def test_models_come_from_a_file_and_can_run_at_once(action: Action, project: Path, program: str) -> None:
    (project / "served.txt").write_text("# what this box serves\nmade-up@8192 # chat\nmade-up@16384\n")
    given = {"program": program, "models-file": "served.txt", "available": "9GiB"}
    assert action.run(project, given).returncode == 0
    assert action.run(project, {**given, "together": "true"}).returncode == 3
    assert action.run(project, {"program": program}).returncode == 2


def test_what_a_pull_request_says_is_never_run(action: Action, project: Path, program: str, tmp_path: Path) -> None:
    hostile = f"$(touch {tmp_path}/ran)@1 ;touch${{IFS}}{tmp_path}/ran;@1 a::error::x@1"
    done = action.run(project, {"program": program, "models": hostile, "available": f"24GiB;touch {tmp_path}/ran"})
    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()


def test_an_upgrade_is_answered_with_what_moved_and_which_verdicts_flip(action: Action, project: Path, program: str) -> None:
    given = {"program": program, "run": "measure", "models": "made-up@8192 made-up@32768", "available": "8GiB"}
    done = action.run(project, given, PULL)

    assert done.returncode == 0, done.stdout + done.stderr
    text = (project / "harness-comment.md").read_text()
    assert text.startswith("<!-- harness -->\n")
    assert (
        "ollama ollama/ollama:0.33.0 → ollama/ollama:0.34.0; vllm vllm/vllm-openai:v0.27.1 → vllm/vllm-openai:v0.28.0" in text
    )
    assert "1 of 1 calibrations that were measured again moved beyond the measurement error" in text
    assert "#### Verdicts on 8GiB: 1 flip" in text
    assert "| made-up\\@\u200b8192 | fits | 4.60 GiB → 6.60 GiB |" in text
    assert "| made-up\\@\u200b32768 | **fits → offload** | 5.28 GiB → 7.28 GiB |" in text
    assert "- vllm/x: the GPU is busy" in text
    assert ("warning", "models/calibrations/llama-server/made-up.yaml", "made-up@32768: fits → offload") in commands(
        done.stdout
    )


def test_a_fork_is_not_measured(action: Action, project: Path, program: str) -> None:
    done = action.run(project, {"program": program, "run": "measure"}, FORK)
    assert done.returncode == 77
    assert not (project / "harness-comment.md").exists()


@pytest.mark.parametrize("existing", [True, False])
def test_there_is_one_comment_a_pull_request(action: Action, tmp_path: Path, existing: bool) -> None:
    listed = [
        {"id": 1, "body": "<!-- harness --> not the action's", "user": "User"},
        {"id": 2, "body": "looks good", "user": "Bot"},
        *([{"id": 3, "body": "<!-- harness -->\nolder", "user": "Bot"}] if existing else []),
    ]
    (tmp_path / "listed").write_text("".join(json.dumps(one) + "\n" for one in listed))
    script(
        tmp_path / "bin/gh",
        f'cd {tmp_path}\necho "$@" >> calls\ncase "$*" in *--paginate*) cat listed ;; *) cat > posted ;; esac',
    )
    (tmp_path / "answer.md").write_text("<!-- harness -->\nmemory `+2 GiB`\n")
    done = action.run(
        tmp_path, {"run": "comment", "comment-file": "answer.md", "token": "t"}, PULL, PATH=f"{tmp_path}/bin:/usr/bin:/bin"
    )

    assert done.returncode == 0, done.stderr
    call = (tmp_path / "calls").read_text().splitlines()[1]
    assert call.startswith(
        "api --method PATCH repos/team/models/issues/comments/3"
        if existing
        else "api --method POST repos/team/models/issues/7/"
    )
    assert json.loads((tmp_path / "posted").read_text())["body"] == "<!-- harness -->\nmemory `+2 GiB`\n"


def test_what_is_installed_is_what_harness_needs_with_hashes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/action.py", "requirements"], capture_output=True, text=True, check=True
    )
    entries = re.split(r"\n(?=[a-z0-9])", done.stdout)
    assert all("--hash=sha256:" in entry for entry in entries)

    def name(requirement: str) -> str:
        found = re.match(r"[A-Za-z0-9._-]+", requirement)
        return "" if found is None else found[0].lower()

    names = {name(entry) for entry in entries}
    wanted = {name(one) for one in metadata.requires("llm-memory-harness") or [] if "extra ==" not in one}
    assert wanted <= names
    assert {"mypy", "xllamacpp", "ray", "plotly", "pytest"} & names == set()


def test_pins_are_found_by_renovates_expression() -> None:
    (manager,) = json.loads((ROOT / "renovate.json").read_text())["customManagers"]
    (pattern,) = manager["matchStrings"]
    found = re.findall(pattern.replace("(?<", "(?P<"), (ROOT / "images/pins.yaml").read_text())
    assert [name for name, _ in found] == ["ollama/ollama", "vllm/vllm-openai"], "an image of our own is in no registry"
    (file,) = manager["managerFilePatterns"]
    assert re.search(file.strip("/"), "images/pins.yaml")


def test_the_jobs_on_the_page_are_what_the_action_takes() -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text()
    jobs: dict[str, Any] = {}
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        jobs |= yaml.safe_load(block).get("jobs", {})
    inputs = yaml.safe_load((ROOT / "action.yml").read_text())["inputs"]
    called = yaml.safe_load((ROOT / ".github/workflows/measure.yml").read_text())[True]["workflow_call"]["inputs"]
    (step,) = [one for one in jobs["guard"]["steps"] if "OWNER/harness" in one["uses"]]
    assert set(step["with"]) <= set(inputs)
    assert set(jobs["measure"]["with"]) <= set(called)
    assert {name for name, one in called.items() if one.get("required")} <= set(jobs["measure"]["with"])
    assert jobs["measure"]["permissions"] == {"contents": "read", "pull-requests": "write"}


def test_the_reusable_workflow_keeps_forks_and_tokens_apart() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/measure.yml").read_text())
    measured, comment = workflow["jobs"]["measure"], workflow["jobs"]["comment"]
    assert workflow["permissions"] == {}
    assert measured["if"] == "github.event.pull_request.head.repo.full_name == github.repository"
    assert (measured["permissions"], comment["permissions"]) == ({"contents": "read"}, {"pull-requests": "write"})
    for job in (measured, comment):
        for step in job["steps"]:
            assert step["uses"] == "./.harness-action" or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
            assert "token" not in step.get("with", {}) or job is comment


@pytest.mark.parametrize(("card", "statuses"), [("7GiB", {3}), ("", {0, 3, 4})])
def test_the_component_for_gitlab_is_yaml_and_shell(project: Path, program: str, card: str, statuses: set[int]) -> None:
    """With no card named it is the runner's own memory, which may hold any verdict, and is no error."""
    spec, jobs = yaml.safe_load_all((ROOT / "templates/guard.yml").read_text())
    (job,) = jobs.values()
    used = set(re.findall(r"\$\[\[ inputs\.(\w+) \]\]", (ROOT / "templates/guard.yml").read_text()))
    assert used == set(spec["spec"]["inputs"])
    inputs = {"models": "made-up@8192 made-up@131072", "available": card}
    env = {
        name: re.sub(r"\$\[\[ inputs\.(\w+) \]\]", lambda found: inputs[found[1]], text)
        for name, text in job["variables"].items()
    }
    path = f"{Path(program).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(job["script"])], cwd=project, env={**env, "PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode in statuses, "error" in done.stderr) == (True, False), done
    assert not card or "FITS" in done.stdout
