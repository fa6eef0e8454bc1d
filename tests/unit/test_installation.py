"""How what is missing is installed: `make setup` where there is a Makefile, the wheel where harness came from one."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from harness import installation

ROOT = Path(__file__).parents[2]


def test_a_checkout_says_make_setup_and_a_wheel_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert installation.install_hint("embedded") == f"install the extra 'embedded': make setup in {ROOT}"
    assert f"-m pip install -e '{ROOT}[hub]'" in installation.install_hint("hub")
    monkeypatch.setattr(installation, "_ABOVE", tmp_path)
    for extra in ("embedded", "hub"):
        hint = installation.install_hint(extra)
        assert "make" not in hint
        assert hint.endswith(f".whl[{extra}]'")


def test_the_wheel_that_was_installed_is_named_with_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "a folder" / "llm_memory_harness-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()

    class Installed:
        def read_text(self, name: str) -> str:
            assert name == "direct_url.json"
            return json.dumps({"url": wheel.as_uri()})

    monkeypatch.setattr(installation, "_ABOVE", tmp_path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: Installed())
    assert installation.install_hint("hub").endswith(f"-m pip install '{wheel}[hub]'")


def test_the_name_of_the_package_stands_in_one_place() -> None:
    assert f'name = "{installation.DISTRIBUTION}"' in (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "harness").rglob("*.py"):
        words = [one.value for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.Constant)]
        named = [
            word
            for word in words
            if isinstance(word, str) and ("make setup" in word or f"{installation.DISTRIBUTION}[" in word)
        ]
        assert not named or path.name in ("installation.py", "__init__.py"), path


def test_no_page_installs_from_an_index_that_has_no_harness() -> None:
    """Each line of a page that installs an extra names a checkout or the wheel, and an extra that there is."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wheel = re.escape(installation.DISTRIBUTION.replace("-", "_"))
    lines = [
        line
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for line in page.read_text().splitlines()
        if re.search(r"pip install [^`]*\[", line)
    ]
    assert len(lines) >= 6
    for line in lines:
        found = re.search(
            rf"pip install (?:-e ['\"](?:\.|path/to/harness)|'\S*{wheel}-VERSION-py3-none-any\.whl)\[(\w+)\]", line
        )
        assert found, line
        assert found[1] in extras, line
