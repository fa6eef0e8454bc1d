"""The documentation is what the code says, and builds without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """This Python in the root of the project, with more in its environment."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_the_reference_is_what_the_code_says() -> None:
    done = python("scripts/reference.py", "--check", PYTHONPATH=str(ROOT))

    assert (done.returncode, done.stderr) == (0, "")


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


@pytest.mark.requires("docs")
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    done = python("-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site"), NO_MKDOCS_2_WARNING="1")

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "site" / "reference" / "cli.html").is_file()
