"""A small runner of composite actions: the ``run`` steps of action.yml, as ``bash -e`` with what GitHub gives them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

_EXPRESSION = re.compile(r"\$\{\{ *(.*?) *\}\}")


class Action:
    """``folder`` is the action's; ``temp`` holds what a job leaves: its summary, its event."""

    def __init__(self, folder: Path, temp: Path) -> None:
        self.folder, self.temp = folder, temp
        self.metadata: dict[str, Any] = yaml.safe_load((folder / "action.yml").read_text())

    def run(
        self, here: Path, given: dict[str, str], event: dict[str, Any] | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its steps in a work tree; stops at the first that fails."""
        assert set(given) <= set(self.metadata["inputs"]), given
        inputs = {name: str(one.get("default", "")) for name, one in self.metadata["inputs"].items()} | given
        file = self.temp / "event.json"
        file.write_text(json.dumps(event or {}))
        done = subprocess.CompletedProcess[str]([], 0, "", "")
        for step in self.metadata["runs"]["steps"]:
            assert step["shell"] == "bash"
            assert not _EXPRESSION.search(step["run"]), "an expression in a script can be made to run anything"
            if "if" in step and not self.holds(step["if"], inputs):
                continue
            given_env = {
                key: _EXPRESSION.sub(lambda match: inputs[match[1].removeprefix("inputs.")], value)
                for key, value in step.get("env", {}).items()
            }
            env = {
                **{key: value for key, value in os.environ.items() if not key.startswith(("HARNESS_", "GITHUB_"))},
                "GITHUB_ACTION_PATH": str(self.folder), "GITHUB_EVENT_PATH": str(file), "GITHUB_REPOSITORY": "team/models",
                "GITHUB_STEP_SUMMARY": str(self.temp / "summary"), "RUNNER_TEMP": str(self.temp),
                **given_env,
                **more,
            }  # fmt: skip
            done = subprocess.run(
                ["bash", "-e", "-c", step["run"]], cwd=here, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                break
        return done

    @staticmethod
    def holds(condition: str, inputs: dict[str, str]) -> bool:
        """``${{ inputs.a == '' && inputs.b != 'c' }}``, and no more than that."""
        inside = _EXPRESSION.fullmatch(condition)
        assert inside is not None
        for part in inside[1].split("&&"):
            name, sign, value = part.split()
            if (inputs[name.removeprefix("inputs.")] == value.strip("'")) != (sign == "=="):
                return False
        return True


def commands(text: str) -> list[tuple[str, str | None, str]]:
    """Workflow commands in a log: level, file and text of each annotation."""
    pattern = re.compile(r"^::(?P<level>\w+)(?: file=(?P<file>[^:,]*))?::(?P<text>.*)$", re.MULTILINE)
    return [(match["level"], match["file"], match["text"]) for match in pattern.finditer(text)]
