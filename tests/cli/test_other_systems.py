"""Verbs that only read run on macOS and Windows as well: nothing that only POSIX has is imported or used on their way.

Those that measure end with one sentence.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.calibrations import made_up, store_of

ROOT: Final = Path(__file__).parents[2]
LOG: Final = ROOT / "tests/golden/llama-server/b10434/host-8192.log"
VLLM: Final = ROOT / "tests/golden/vllm/0.32.0-cpu/tiny-llama.yaml"
RECORD: Final = ROOT / "tests/golden/ollama/0.32.14-cpu"
#: As on a system without these modules, flags, calls and signals.
ELSEWHERE: Final = """
import os, signal, sys
sys.platform = "elsewhere"
for name in ("fcntl", "resource", "pwd", "termios", "grp"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "geteuid", "getuid", "getpgrp", "fork"):
    delattr(os, name)
del signal.SIGHUP
from harness.cli.main import main
sys.argv = ["harness", *sys.argv[1:]]
main()
"""
VERBS: Final = {
    "parse": ("parse", str(LOG)),
    "import": ("import", str(LOG), "--total", "700MiB"),
    "predict": ("predict", "tiny", "--ctx", "8192"),
    "check": ("check", "tiny@4096", "--available", "24GiB"),
    "plan": ("plan", "tiny", "--available", "24GiB"),
    "allocate": ("allocate", "tiny-llama", "--ctx", "4096", "--available", "8GiB", "--allow-model"),
    "show": ("show", "tiny"),
    "list": ("list",),
    "diff": ("diff", "store", "store"),
    "report": ("report", "-o", "report.html"),
    "fit": ("fit", str(RECORD), "-o", "again.yaml"),
}


def elsewhere(here: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments, "--json"], cwd=here, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "HARNESS_STORE": str(here / "store"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_reads_runs_without_what_only_posix_has(verb: str, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up("tiny"))
    (tmp_path / "store" / "vllm").mkdir()
    shutil.copy(VLLM, tmp_path / "store" / "vllm")
    status, answer = elsewhere(tmp_path, *VERBS[verb])
    assert status == 0, answer["errors"]
    assert answer["data"]


def test_merge_runs_without_what_only_posix_has(tmp_path: Path) -> None:
    store_of(tmp_path / "other", made_up("tiny"))
    (tmp_path / "store").mkdir()
    status, answer = elsewhere(tmp_path, "merge", "other")
    assert status == 0, answer["errors"]
    assert (tmp_path / "store" / "llama-server" / "tiny.yaml").is_file()


@pytest.mark.parametrize("verb", ["calibrate", "serve tiny --ctx 4096", "recalibrate", "sweep plan.yaml", "doctor", "clean"])
def test_a_verb_that_measures_ends_with_one_sentence(verb: str, tmp_path: Path) -> None:
    status, answer = elsewhere(tmp_path, *verb.split())
    assert status == 69
    (error,) = answer["errors"]
    assert error["code"] == "not-linux"
    assert error["message"] == "engines are started and measured on Linux alone, and this is elsewhere"


def test_the_library_says_the_same(tmp_path: Path) -> None:
    code = ELSEWHERE.partition("from harness")[0] + "import harness\nharness.calibrate()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert "UnavailableError: engines are started and measured on Linux alone" in done.stderr
