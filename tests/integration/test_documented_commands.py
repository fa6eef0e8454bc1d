"""Every command that the README and the tutorial show is run, in their order, as a newcomer would.

Not run is a block below ``<!-- shown only: why -->``, and the clone, which is this checkout. A command ends with 0, or with the
status that ``<!-- status: 3 -->`` above its block says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(?:<!-- (?P<rule>[^>]*) -->\n)?```console\n(?P<text>.*?)```", re.DOTALL)

pytestmark = [pytest.mark.requires("embedded"), pytest.mark.slow]


def commands(page: Path) -> list[tuple[str, int]]:
    found = []
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        rule = block["rule"] or ""
        if rule.startswith("shown only: "):
            continue
        status = int(rule.removeprefix("status: ")) if rule.startswith("status: ") else 0
        lines = block["text"].replace("\\\n", " ").splitlines()
        found += [(line.removeprefix("$ "), status) for line in lines if line.startswith("$ ") and "git clone" not in line]
    return found


@pytest.mark.timeout(900)  # measurements of a real model, on a machine that does other things, too
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_what_a_page_shows_works_in_its_order(page: str, tmp_path: Path) -> None:
    shown = commands(ROOT / page)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HARNESS_STORE": str(tmp_path / "store"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
    }

    assert shown, "the page shows no command"
    for command, status in shown:
        done = subprocess.run(["bash", "-ec", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
