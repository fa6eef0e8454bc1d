"""Does a fast test notice when a threshold or an operator changes? ``python -m bench.mutants [WORD...]``.

Each mutant replaces one piece of ``harness/`` in a copy of the tree and runs the tests named beside it. A mutant that lives is
a missing test, or a line without use. A piece that is no longer in the code, or stands there twice, is reported as well: the
list follows the code. Words select the mutants whose piece or tests contain one of them. The exit status is the number of
mutants that were not killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("harness", "tests", "models", "images", "bench", "pyproject.toml")
LIMIT_SECONDS = 600


class Outcome(NamedTuple):
    """What became of a mutant: ``killed``, ``lived``, or why it could not be tried."""

    mutant: Mutant
    word: str
    detail: str = ""


def find(root: Path, piece: str) -> list[Path]:
    """The files of ``harness/`` that hold a piece of code; the same file twice where it stands there twice."""
    files = [path for path in sorted((root / "harness").rglob("*")) if path.suffix in (".py", ".js")]
    return [path for path in files for _ in range(path.read_text(encoding="utf-8").count(piece))]


def tests_of(root: Path, names: str) -> list[str]:
    """The test files with these names, wherever they are below ``tests/unit`` and ``tests/cli``."""
    found = [path.relative_to(root) for name in names.split() for path in sorted((root / "tests").rglob(f"{name}.py"))]
    return [str(path) for path in found if path.parts[1] in ("unit", "cli")]


def run_tests(root: Path, files: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run test files in a copy; nothing is cached, so that a changed file is always read again."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)}
    argv = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    return subprocess.run(argv, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)


def attempt(root: Path, mutant: Mutant) -> Outcome:
    """Try one mutant in a copy of the tree, and put the file back."""
    holders = find(root, mutant.old)
    if len(holders) != 1:
        return Outcome(mutant, "not tried", f"the piece stands {len(holders)} times in harness/")
    files = tests_of(root, mutant.tests)
    if len(files) < len(mutant.tests.split()):
        return Outcome(mutant, "not tried", f"no such tests: {mutant.tests}")
    path, text = holders[0], holders[0].read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        done = run_tests(root, files)
    except subprocess.TimeoutExpired:
        return Outcome(mutant, "too slow", f"no result within {LIMIT_SECONDS} s")
    finally:
        path.write_text(text)
    if done.returncode == 0:
        return Outcome(mutant, "lived", path.relative_to(root).as_posix())
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    return Outcome(mutant, "killed", failed.partition(" - ")[0])


def main(words: Sequence[str]) -> int:
    """Try the mutants that the words select, all of them without words."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in f"{mutant.old} {mutant.tests}" for word in words)]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="harness-mutants-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / name)
        unchanged = run_tests(root, sorted({file for mutant in chosen for file in tests_of(root, mutant.tests)}))
        if unchanged.returncode != 0:
            print("the tests fail without any change:", *unchanged.stdout.splitlines()[-10:], sep="\n")
            return 1
        for mutant in chosen:
            outcome = attempt(root, mutant)
            outcomes.append(outcome)
            print(f"{outcome.word:9}  {mutant.old.strip().splitlines()[0][:70]!r}  {outcome.detail}", flush=True)
    left = [outcome for outcome in outcomes if outcome.word != "killed"]
    print(f"{len(outcomes)} mutants: {len(outcomes) - len(left)} killed, {len(left)} not")
    return len(left)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
