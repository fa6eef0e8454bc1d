"""What a verb imports: ``harness check`` runs before every start of a model, so it loads what it needs and no more.

The list of modules is what is held, not a time: it is the same on every machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.calibrations import made_up, store_of

ROOT = Path(__file__).parents[2]
#: Clients of daemons, drivers and engines, and what only draws or calculates for other verbs.
HEAVY = {
    "docker", "requests", "urllib3", "pynvml", "httpx", "httpcore", "ollama", "pydantic", "psutil", "rich", "plotly", "ray",
    "numpy", "gguf", "jinja2", "tenacity", "filelock", "asyncio", "ssl", "subprocess", "multiprocessing",
}  # fmt: skip
#: Rooms that measure, start or draw: a verdict is read from a file.
ROOMS = {"measure", "maintain", "sweep", "sandboxes", "meters", "logs", "report"}
CODE = """
import json, sys
before = set(sys.modules)  # a site's own startup files may load anything
from harness.cli.main import main
sys.argv = ["harness", *sys.argv[1:]]
status = 0
try:
    main()
except SystemExit as end:
    status = end.code or 0
print(json.dumps([status, sorted(set(sys.modules) - before)]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("check", "made-up@8192", "--available", "24GiB"), 0),
        (("check", "made-up@8192", "--available", "24GiB", "--json"), 0),
        (("check", "made-up@65536", "--available", "5GiB"), 3),
        (("check", "llama-server/made-up@8192", "--available", "24GiB"), 0),
        (("check", "unheard-of@8192", "--available", "24GiB"), 4),
        (("predict", "made-up", "--ctx", "8192", "--json"), 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_verdict_loads_no_client_of_what_it_does_not_ask(tmp_path: Path, arguments: tuple[str, ...], status: int) -> None:
    store_of(tmp_path, made_up())
    env = {**os.environ, "HARNESS_STORE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=99
    )
    ended, modules = json.loads(done.stderr.splitlines()[-1])
    assert ended == status
    assert {name.partition(".")[0] for name in modules} & HEAVY == set()
    assert {name.split(".")[1] for name in modules if name.startswith("harness.")} & ROOMS == set()


def test_importing_it_costs_nothing() -> None:
    code = (
        "import sys, harness; print(sorted(m for m in sys.modules if m.startswith(('harness.', 'msgspec', 'yaml', 'httpx'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
