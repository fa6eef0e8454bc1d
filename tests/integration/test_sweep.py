"""A sweep on this machine, with the real engine: cells are kept as they end, and a poisoned one stops nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import write_tiny_llama

pytestmark = pytest.mark.requires("embedded")


def sweep(plan: Path, store: Path, *more: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "sweep", str(plan), "--store", str(store), "--json", *more],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["exit_code"] == done.returncode
    return done.returncode, answer


def test_a_poisoned_cell_stops_nothing_and_runs_again_on_resume(tmp_path: Path) -> None:
    model, poisoned = write_tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "poisoned.gguf"
    # Only the engine finds out: what can be seen before, a sweep refuses as a whole.
    named, rest = model.read_bytes().split(b"general.architecture", 1)
    poisoned.write_bytes(named + b"general.architecture" + rest.replace(b"llama", b"xlama", 1))
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"""
        defaults: {{engine: llama-server, sandbox: process, gpus: none, speed: false, ctx: '1024,2048,4096'}}
        matrix: {{model: ['{poisoned}', '{model}'], kv_cache_type: [f16, q8_0]}}
        exclude: [{{model: '{poisoned}', kv_cache_type: q8_0}}]
        """
    )
    store = tmp_path / "store"

    status, planned = sweep(plan, store, "--dry-run")
    assert (status, len(planned["data"]["cells"]), planned["data"]["loads"]) == (0, 3, 9)
    assert planned["data"]["estimated_seconds"] is None
    assert not store.exists()

    status, first = sweep(plan, store)
    assert status == 70
    assert [cell["status"] for cell in first["data"]["cells"]] == ["failed", "done", "done"]
    assert [error["code"] for error in first["errors"]] == ["engine-ended"]
    assert sorted(path.name for path in store.glob("*/*.yaml")) == ["tiny.yaml", "tiny@q8_0.yaml"]

    write_tiny_llama(poisoned)
    status, second = sweep(plan, store, "--resume")
    assert status == 0
    assert [cell["cell"]["model"] for cell in second["data"]["cells"]] == [str(poisoned)]

    status, third = sweep(plan, store, "--resume", "--dry-run")
    assert (status, third["data"]["cells"], third["data"]["total"]) == (0, [], 3)
