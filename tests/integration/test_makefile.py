"""What a user types after MODEL= or ARGS= reaches the program as it is, and is evaluated by nobody on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
_HOSTILE = [
    "$(shell touch pwned)",
    "$$(touch pwned)",
    "$(touch pwned)",
    "${shell touch pwned}",
    "`touch pwned`",
    'a"; touch pwned; "',
    "a'; touch pwned; '",
    "a\ntouch pwned",
    "a && touch pwned",
    "a # b",
    "$(error no)",
    "$@ $(MAKEFLAGS) $HOME %",
    "* ?",
    "..\\..\\",
    "модель:7b",
]

pytestmark = [pytest.mark.skipif(shutil.which("make") is None, reason="needs make")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile among stand-ins: a set-up that has nothing to do, and a harness that writes down what reached it."""
    shutil.copy(_ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_text("exit 0\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    harness = tmp_path / ".venv/bin/harness"
    harness.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "json.dump({'argv': sys.argv[1:], 'env': dict(os.environ)}, open('seen.json', 'w'))\n"
    )
    harness.chmod(0o755)
    return tmp_path


def _make(checkout: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MODEL", "ARGS"))}
    run = subprocess.run(
        ["make", "calibrate", *arguments],
        cwd=checkout,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen: dict[str, Any] = json.loads((checkout / "seen.json").read_text())
    return seen


@pytest.mark.parametrize("model", _HOSTILE)
def test_a_hostile_model_name_arrives_untouched(checkout: Path, model: str) -> None:
    seen = _make(checkout, f"MODEL={model}")

    assert seen["env"]["HARNESS_MODEL"] == model
    assert seen["argv"] == ["calibrate"]
    assert "MODEL" not in seen["env"].get("MAKEFLAGS", ""), "a make started below would evaluate it"
    assert not (checkout / "pwned").exists()


@pytest.mark.parametrize("model", _HOSTILE)
def test_a_hostile_model_name_in_the_environment_arrives_untouched(checkout: Path, model: str) -> None:
    seen = _make(checkout, MODEL=model)

    assert seen["env"]["HARNESS_MODEL"] == model
    assert not (checkout / "pwned").exists()


@pytest.mark.parametrize("arguments", _HOSTILE)
def test_hostile_options_are_only_split_at_white_space(checkout: Path, arguments: str) -> None:
    seen = _make(checkout, f"ARGS={arguments}")

    assert seen["argv"] == ["calibrate", *arguments.split()]
    assert not (checkout / "pwned").exists()


def test_options_reach_the_command(checkout: Path) -> None:
    seen = _make(checkout, "ARGS=--ctx 4096,8192 --json")

    assert seen["argv"] == ["calibrate", "--ctx", "4096,8192", "--json"]


def test_without_a_model_the_embedded_one_is_meant(checkout: Path) -> None:
    assert _make(checkout)["env"]["HARNESS_MODEL"] == "gemma3:270m"


def test_help_lists_every_target_with_its_purpose(checkout: Path) -> None:
    shown = subprocess.run(["make"], cwd=checkout, capture_output=True, text=True, check=True).stdout

    phony = next(line for line in (checkout / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    described = {line.split()[1] for line in shown.splitlines() if line.startswith("  make ")}
    assert described == set(phony.split()[1:])
