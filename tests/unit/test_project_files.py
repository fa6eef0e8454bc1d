"""What the project's files say of each other stays true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from harness import errors

_ROOT = Path(__file__).parents[2]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_LOCK = (_ROOT / "requirements.lock").read_text()


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")


def test_the_lock_holds_every_requirement() -> None:
    project = _PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["embedded"],
        *_PROJECT["dependency-groups"]["dev"],
        *_PROJECT["build-system"]["requires"],
    ]

    assert {_name(requirement) for requirement in wanted} <= set(re.findall(r"^([a-z0-9._-]+)==", _LOCK, re.MULTILINE))


def test_each_locked_package_has_a_hash() -> None:
    packages = re.split(r"^(?=[a-z0-9])", _LOCK, flags=re.MULTILINE)[1:]

    assert packages
    assert [package.split()[0] for package in packages if "--hash=sha256:" not in package] == []


def test_the_lock_names_no_index() -> None:
    """Where packages come from is the machine's own setting."""
    assert not re.search(r"^\s*(-i|-f|--(extra-)?index-url|--find-links|--trusted-host)|://", _LOCK, re.MULTILINE)


def test_each_exit_status_is_documented() -> None:
    documented = set(re.findall(r"^\| (\d+) \|", (_ROOT / "docs/reference/exit-codes.md").read_text(), re.MULTILINE))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HarnessError)]
    raised = {str(kind.exit_code) for kind in kinds}

    assert raised - documented == set()


@pytest.mark.parametrize(
    "page", sorted([*_ROOT.glob("*.md"), *_ROOT.glob("docs/**/*.md")]), ids=lambda page: str(page.relative_to(_ROOT))
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []
