"""What the project's files say of each other stays true."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from bench import mutants
from bench.beyond import Beyond, Setting, contexts_text, settings_text
from bench.mutant_list import MUTANTS
from bench.verdict_page import PAGE
from harness import errors

_ROOT = Path(__file__).parents[2]


_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())


_LOCKS = {name: (_ROOT / name).read_text() for name in ("requirements.lock", "requirements-dev.lock", "requirements-ci.lock")}


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")


def _locked(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", _LOCKS[lock], re.MULTILINE))


def test_the_locks_hold_every_requirement() -> None:
    project, extras, groups = _PROJECT["project"], _PROJECT["project"]["optional-dependencies"], _PROJECT["dependency-groups"]
    usual = [
        *project["dependencies"],
        *extras["embedded"],
        *extras["report"],
        *groups["build"],
        *_PROJECT["build-system"]["requires"],
    ]
    more = [*project["dependencies"], *extras["fleet"], *groups["ci"]]

    assert {_name(requirement) for requirement in usual} <= _locked("requirements.lock").keys()
    assert {_name(requirement) for requirement in groups["dev"]} <= _locked("requirements-dev.lock").keys()
    assert {_name(requirement) for requirement in more} <= _locked("requirements-ci.lock").keys()


@pytest.mark.parametrize(("lock", "other"), list(itertools.combinations(_LOCKS, 2)))
def test_a_package_in_two_locks_has_one_version(lock: str, other: str) -> None:
    one, two = _locked(lock), _locked(other)

    assert {name: (one[name], two[name]) for name in one.keys() & two.keys() if one[name] != two[name]} == {}


@pytest.mark.parametrize("lock", _LOCKS)
def test_each_locked_package_has_a_hash(lock: str) -> None:
    packages = re.split(r"^(?=[a-z0-9])", _LOCKS[lock], flags=re.MULTILINE)[1:]

    assert packages
    assert [package.split()[0] for package in packages if "--hash=sha256:" not in package] == []


@pytest.mark.parametrize("lock", _LOCKS)
def test_a_lock_names_no_index(lock: str) -> None:
    """Where packages come from is the machine's own setting."""
    assert not re.search(r"^\s*(-i|-f|--(extra-)?index-url|--find-links|--trusted-host)|://", _LOCKS[lock], re.MULTILINE)


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


@pytest.mark.parametrize("run", ["ollama/0.32.14-cpu/gemma3-270m.yaml", "vllm/0.32.0-cpu/tiny-llama.yaml"])
def test_an_artifact_in_the_documentation_is_that_of_the_recorded_run(run: str) -> None:
    recorded = (_ROOT / "tests/golden" / run).read_text().splitlines()
    blocks = re.findall(
        r"^```yaml\n(.*?)^```$", (_ROOT / "docs/explanation/two-engines.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (shown,) = [block for block in blocks if block.startswith(recorded[0] + "\n")]

    assert [line for line in shown.splitlines() if line not in recorded] == []


def test_the_list_of_mutants_follows_the_code() -> None:
    """A piece that is gone, or stands twice, is tried by nobody."""
    text = "\0".join(path.read_text() for path in sorted((_ROOT / "harness").rglob("*")) if path.suffix in (".py", ".js"))
    assert [mutant.old for mutant in MUTANTS if text.count(mutant.old) != 1] == []
    assert [
        names for names in {mutant.tests for mutant in MUTANTS} if len(mutants.tests_of(_ROOT, names)) < len(names.split())
    ] == []


def test_tables_of_verdicts_have_the_form_that_their_bench_writes() -> None:
    """The bench puts them there itself; a table by hand would look otherwise sooner or later."""
    setting = Setting(
        model="m", of="f16 on 1", asked="f16 on 2", verdict="fits", source=None, required=99, truth=100, false_fit=False
    )
    load = Beyond(model="m", mode="f16, FA on", context=32768, truth=100.0, predicted=100, uncertainty=1)
    for name, text in (("settings", settings_text([setting])), ("contexts", contexts_text([load], []))):
        written = PAGE.read_text().split(f"<!-- {name} -->\n\n")[1].split(f"\n\n<!-- end of {name} -->")[0].splitlines()
        summary, head = text.splitlines()[0], next(line for line in text.splitlines() if line.startswith("|"))
        assert re.sub(r"[\d.,]+", "0", written[0]) == re.sub(r"[\d.,]+", "0", summary)
        assert head in written
        assert all(line.count("|") == head.count("|") for line in written if line.startswith("|"))
