"""Ollama as it is installed, without Docker: measured end to end with the stand-in as the program, and nothing touched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.engines.gguf import sha256
from harness.errors import EngineError, UntrustedError
from harness.measure.calibrate import Result, Session
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.options import RunOptions
from harness.ownership import MARK
from harness.sandboxes.reaper_main import HOME_PREFIX
from harness.store.store import Store
from harness.units import GIB
from tests.support.models import KV_PER_TOKEN
from tests.support.ollama import registry, standin
from tests.support.ollama_installed import program, state, store
from tests.support.waiting import until

pytestmark = pytest.mark.requires("embedded")
PRIVATE = Path("/var/tmp")


def private_folders(*owners: int | None) -> set[Path]:
    """Those of engines that these processes have started (``None``: of no known owner), and not of a run beside the tests."""
    found = set()
    for folder in PRIVATE.glob(f"{HOME_PREFIX}*"):
        owner = None
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads((folder / MARK).read_bytes())["pid"]
        if owner in owners:
            found.add(folder)
    return found


@pytest.fixture
def ours() -> Iterator[list[int]]:
    """The processes that may start engines; none of their private folders is left, however a test ends."""
    owners, before = [os.getpid()], private_folders(None)
    yield owners
    until(lambda: private_folders(None, *owners) <= before, "the private folders to go")


def ready(folder: Path, binary: Path, model: str = "tiny", **given: Any) -> Session:
    wished = {"contexts": (1024, 2048, 4096), "speed": False, "timeout": 200.0, **given}
    asked = RunOptions(model=model, engine="ollama", gpus="none", engine_binary=str(binary), **wished)
    return prepare(asked, Store(folder / "store"), folder)


def calibrate(folder: Path, binary: Path, model: str = "tiny", hook: Any = lambda _: None, **given: Any) -> Result:
    return ready(folder, binary, model, **given).calibrate(Observer(), hook)


def test_a_model_of_the_user_s_is_measured_and_nothing_of_theirs_is_touched(
    tmp_path: Path, engine_bin: Path, ours: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their server runs meanwhile: it is asked nothing that changes it, and their store is as it was."""
    models = store(tmp_path / "models")
    before = state(models)
    monkeypatch.setattr("harness.engines.ollama.servers._ANSWER", 200.0)
    with standin(tmp_path, OLLAMA_MODELS=str(models), STANDIN_VERSION="0.32.0") as client:
        monkeypatch.setenv("OLLAMA_HOST", f"{client.base_url.host}:{client.base_url.port}")
        session = ready(tmp_path, program(tmp_path / "bin", engine_bin), models=str(models))
        assert any("is 0.32.0, the one measured now 0.33.0" in reason for reason in session.choice.reasons)
        result = session.calibrate(Observer())
        assert client.get("/api/version").is_success, "it still runs"
    asked = {line.split('"')[1] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("[GIN]")}
    assert asked <= {"/api/version", "/api/ps"}
    assert state(models) == before
    metadata = result.calibration.metadata
    assert (metadata.machine.sandbox, metadata.machine.meter, metadata.machine.target) == ("process", "host", "host")
    assert (metadata.engine.version, metadata.engine.image) == ("0.33.0", None)
    assert metadata.model.digest == sha256(registry() / "tiny.gguf")
    slope = result.calibration.constants.kv_cache_gb_per_10k * GIB / 10_000
    assert slope == pytest.approx(KV_PER_TOKEN, rel=0.001)


def test_a_file_is_measured_without_a_copy(tmp_path: Path, engine_bin: Path, ours: list[int]) -> None:
    biggest = 0

    def look(_: str) -> None:
        nonlocal biggest
        for folder in private_folders(*ours):
            biggest = max(biggest, *(path.lstat().st_size for path in folder.rglob("*")), 0)

    result = calibrate(tmp_path, program(tmp_path / "bin", engine_bin), str(registry() / "tiny.gguf"), look)
    assert result.calibration.id == "ollama/tiny"
    assert 0 < biggest < 1 << 20, "links and small files"


def test_an_upgrade_during_the_run_is_seen(tmp_path: Path, engine_bin: Path, ours: list[int]) -> None:
    binary = program(tmp_path / "bin", engine_bin)

    def upgrade(stage: str) -> None:
        if stage == "recorded":
            program(tmp_path / "new", engine_bin, STANDIN_VERSION="0.34.0").replace(binary)

    with pytest.raises(UntrustedError) as caught:
        calibrate(tmp_path, binary, models=str(store(tmp_path / "models")), hook=upgrade)
    assert caught.value.code == "engine-changed"


def test_a_program_of_another_architecture_is_said(tmp_path: Path, ours: list[int]) -> None:
    binary = tmp_path / "ollama"
    binary.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    binary.chmod(0o755)
    with pytest.raises(EngineError, match="processor"):
        calibrate(tmp_path, binary, models=str(store(tmp_path / "models")))


def test_killed_it_leaves_no_server_and_no_folder(tmp_path: Path, engine_bin: Path, ours: list[int]) -> None:
    """SIGKILL, so that nothing of ours can tidy up: the reaper does."""
    binary, models = program(tmp_path / "bin", engine_bin), store(tmp_path / "models")
    command = [sys.executable, "-m", "harness", "calibrate", "tiny", "--engine", "ollama", "--gpus", "none", "--no-speed"]
    command += ["--engine-binary", str(binary), "--models", str(models), "--store", str(tmp_path / "store")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours[:] = [process.pid]
    until(lambda: private_folders(*ours) or process.poll() is not None, "the private folder")
    process.send_signal(signal.SIGKILL)
    process.wait(200)
