"""What docs/reference/json.md says of each verb's ``data`` is what the verb prints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.fit.constants import fit_record
from harness.store.store import Store
from tests.support.records import load, record

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| `(?P<verb>[a-z]+)` \| (?P<keys>[^|]*) \|$", re.MULTILINE)
PAGE = {
    row["verb"]: set(re.findall(r"`(\w+)`", row["keys"].partition(" (")[0]))
    for row in _ROW.finditer((ROOT / "docs/reference/json.md").read_text(encoding="utf-8"))
}
RUN = record(load(8192), load(16384), load(32768))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = Store(tmp_path_factory.mktemp("store"))
    shelf.write(shelf.path_of("llama-server", "made-up"), fit_record(RUN))
    shelf.write_record(RUN)
    golden = ROOT / "tests/golden/vllm/0.32.0-cpu/tiny-llama.yaml"
    (shelf.root / "vllm").mkdir()
    shutil.copy(golden, shelf.root / "vllm" / golden.name)
    return shelf.root


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "made-up", "--ctx", "8192"),
        ("check", "made-up@8192", "--available", "24GiB"),
        ("plan", "--available", "24GiB"),
        ("tune", "made-up", "--available", "24GiB"),
        ("export", "llama-server", "made-up", "--available", "24GiB"),
        ("allocate", "tiny-llama", "--ctx", "4096", "--available", "8GiB"),
        ("show", "made-up"),
        ("list",),
        ("parse", str(ROOT / "tests/golden/llama-server/b10434/vulkan-np2.log")),
        ("fit", RUN.run),
        ("recalibrate", "--dry-run", "made-up"),
        ("diff", "{store}", "{store}"),
        ("report", "-o", "{store}/report.html"),
        ("merge", "{store}"),
        ("exporter", "--once"),
        ("doctor",),
        ("clean",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_page_names_the_keys_of_data(arguments: tuple[str, ...], store: Path) -> None:
    words = [word.replace("{store}", str(store)) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words, "--store", str(store), "--json"]
        if arguments[0] not in ("parse", "diff", "clean")
        else [sys.executable, "-m", "harness", *words, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    answer = json.loads(done.stdout)
    assert answer["errors"] == []
    assert set(answer["data"]) == PAGE[arguments[0]]
