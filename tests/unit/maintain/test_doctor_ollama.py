"""What ``doctor`` says of an Ollama without Docker."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engines.ollama import findings
from harness.engines.ollama.recipe import Ollama
from harness.engines.running import RunningModel, RunningServer
from tests.support.ollama_installed import program


def test_the_program_and_what_runs_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RunningModel(name="qwen2.5:7b", size_bytes=5 << 30, gpu_bytes=4 << 30, context=4096)
    settings = {"OLLAMA_NUM_PARALLEL": "4"}
    servers = (
        RunningServer(pid=1, port=11434, version="0.33.0", models=(model,), settings=settings, readable=True),
        RunningServer(pid=2, port=11500, version="0.32.0"),
    )
    monkeypatch.setattr(findings, "running_servers", lambda _: servers)
    monkeypatch.setenv("PATH", str(program(tmp_path, Path("/engine")).parent))
    installed, busy, idle = Ollama().findings(())
    assert (installed.code, installed.state) == ("ollama-installed", "ok")
    assert ("OLLAMA_NUM_PARALLEL=4" in busy.text, "ollama stop qwen2.5:7b" in str(busy.hint)) == (True, True)
    assert (idle.hint, "another account's" in idle.text) == (None, True)
    monkeypatch.setattr(findings, "running_servers", lambda _: ())
    monkeypatch.setenv("PATH", "/nowhere")
    (missing,) = Ollama().findings(())
    assert (missing.code, missing.state) == ("ollama-not-installed", "note")
