"""What the files that make and pin images promise."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.options import settings
from harness.sandboxes.container_config import check_reference

ROOT = Path(__file__).parents[2]
PINS: dict[str, str] = yaml.safe_load((ROOT / "images" / "pins.yaml").read_text())
DOCKERFILES = sorted((ROOT / "images").glob("*.Dockerfile"))


def test_every_engine_has_an_image_pinned_by_tag() -> None:
    assert PINS.keys() == {"ollama", "vllm", "llama-server"}
    for image in PINS.values():
        assert check_reference(image) == image
        assert re.search(r":(?!latest(?:@|$))[\w.-]+(?:@sha256:[0-9a-f]{64})?$", image)


def test_the_llama_server_that_is_pinned_is_the_one_of_the_lock() -> None:
    locked = re.search(r"^xllamacpp==\d+\.\d+\.(\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert PINS["llama-server"].endswith(f":b{locked[1]}")
    assert PINS["llama-server"] in (ROOT / "images" / "llama-server.Dockerfile").read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_shell_reads_what_is_given_to_a_container(path: Path) -> None:
    lines = path.read_text().splitlines()
    (entry,) = [line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT ")]
    program, *arguments = json.loads(entry)
    assert [Path(word).name for word in (program, *arguments)] in (["harness"], ["python3", "llama-server"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_sent_to_the_daemon(path: Path) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [line.split()[1:-1] for line in path.read_text().splitlines() if re.match(r"COPY (?!--from)", line)]
    assert copies
    assert [name for names in copies for name in names if not {name, name.split("/")[0]} & sent] == []


def test_the_image_of_harness_has_every_file_that_its_wheel_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    forced = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    copied = (ROOT / "images" / "harness.Dockerfile").read_text().split()
    assert {*forced, "pyproject.toml", "README.md", "LICENSE", "harness"} <= {*copied}


def test_harness_in_a_container_sees_the_machine_s_processes_and_says_what_its_socket_means() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    service: dict[str, Any] = yaml.safe_load(text)["services"]["harness"]
    assert (service["pid"], service["network_mode"]) == ("host", "host")
    assert "/var/run/docker.sock:/var/run/docker.sock" in service["volumes"]
    assert ".:${PWD}" in service["volumes"], "the daemon mounts models by the machine's paths"
    assert not {"command", "entrypoint", "privileged"} & service.keys()
    assert "is root on this machine" in text


def test_a_container_answers_about_what_is_set_in_the_shell_around_it() -> None:
    handed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["harness"]["environment"]
    passed = {name for name, value in handed.items() if value is None}  # Compose takes the shell's, or leaves it unset
    assert passed == {one.variable for one in settings().values()}


def test_what_an_image_fetches_is_checked_against_hashes() -> None:
    for path in DOCKERFILES:
        commands = " ".join(path.read_text().replace("\\\n", " ").split())
        fetching = re.findall(r"pip (?:download|install|wheel) [^&]*", commands)
        assert fetching
        for command in fetching:
            assert "--require-hashes" in command or "--no-index" in command, command


def test_a_job_that_may_write_runs_nothing_of_the_repository() -> None:
    """What runs there could change what it writes: the credentials stay out of reach of installed and built code."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            writes = "write" in job["permissions"].values()
            pinned = set()
            for step in job["steps"]:
                if "actions/checkout" in step.get("uses", ""):
                    assert step["with"]["persist-credentials"] is False
                    if step["with"].get("repository") == "${{ inputs.harness }}" and step["with"]["ref"] == "${{ inputs.ref }}":
                        pinned.add(
                            f"./{step['with']['path']}"
                        )  # this project at the commit its caller named, not the caller's files
                if "uses" in step and step["uses"] not in pinned:
                    assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), f"{name}: {step['uses']} is no commit"
                if writes:
                    assert not re.search(r"make |\.venv|pip |python|scripts/|\./", step.get("run", "")), name
