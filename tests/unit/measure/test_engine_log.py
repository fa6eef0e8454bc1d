"""Why an engine ended, and what to do about it."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from harness.engines.registry import policy_of
from harness.errors import EngineError, UnavailableError, WontFitError
from harness.measure.engine_log import check_alive, explain_image
from harness.sandboxes.base import ImageFacts
from tests.support.fakes import FakeRunning, World, calibrate, only_record
from tests.support.true_model import TrueModel


@pytest.mark.parametrize(("limit", "kind"), [(resource.RLIM_INFINITY, WontFitError), (1 << 30, EngineError)])
def test_a_shell_that_limits_memory_is_named_in_place_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, kind: type[EngineError]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    (tmp_path / "log").write_text("terminate called: std::bad_alloc\n")
    running = FakeRunning(World(TrueModel(weights=0, overhead=0, kv_per_cell=1)), tmp_path / "log")
    running.status = 134
    with pytest.raises(kind) as caught:
        check_alive(running, policy_of("llama-server"))
    assert ("ulimit -v" in caught.value.message) is (kind is EngineError)


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (
            "system_info: CPU : SSE3 = 1 | AVX2 = 1 | AVX_VNNI = 1 | AMX_INT8 = 1 | \n",
            "was compiled for AVX_VNNI, AMX_INT8, which",
        ),
        ("a log of another form\n", "needs instructions that this CPU lacks"),
    ],
)
def test_an_engine_that_dies_of_an_instruction_names_the_set_that_this_cpu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, says: str
) -> None:
    """As at the first decode: long after its log has said what it was compiled for."""
    monkeypatch.setattr("harness.measure.engine_log.cpu_flags", lambda: frozenset({"pni", "avx2"}))
    (tmp_path / "log").write_text(log + "srv  update_slots: all slots are idle\n" * 1000)
    running = FakeRunning(World(TrueModel(weights=0, overhead=0, kv_per_cell=1)), tmp_path / "log")
    running.status = 128 + signal.SIGILL
    with pytest.raises(EngineError, match="SIGILL") as caught:
        check_alive(running, policy_of("llama-server"))
    assert (caught.value.code, caught.value.exit_code) == ("illegal-instruction", 70)
    assert says in caught.value.message
    assert "--engine-binary" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("command", "said"),
    [(("python3",), True), ((), True), (("/bin/ollama",), False), (("/bin/ollama-start",), False)],
)
def test_an_image_of_something_else_is_named_as_such(command: tuple[str, ...], said: bool) -> None:
    error = EngineError("the engine ended with status 2", code="engine-ended")
    explain_image(error, ImageFacts(reference="python:3.13", digest=None, command=command), policy_of("ollama"))
    assert (error.code == "other-image") is said
    assert ("python:3.13 may be no image of Ollama" in error.message) is said
    explain_image(error, None, policy_of("ollama"))  # a process has no image


def test_a_server_without_the_gpu_that_was_asked_for_ends_the_run_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TrueModel(weights=1, overhead=0, kv_per_cell=1)
    world = World(model, engine="ollama", persistent=True, sandbox="docker", target="gpu")
    world.plots["start"] = lambda: world.write('level=INFO msg="inference compute" id=cpu library=cpu compute=""\n')
    with pytest.raises(UnavailableError, match="sees no GPU") as caught:
        calibrate(world, monkeypatch, tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("gpu-not-seen", 69)
    assert "Test A" in caught.value.message
    assert "prepare" not in world.events
    assert only_record(tmp_path).status == "partial"


def test_a_folder_of_models_that_a_container_may_not_read_is_explained(tmp_path: Path) -> None:
    """Ollama 0.33.0 with its models lent by another account."""
    (tmp_path / "log").write_text("Error: mkdir /ollama/blobs: permission denied: ensure path elements are traversable\n")
    running = FakeRunning(World(TrueModel(weights=0, overhead=0, kv_per_cell=1)), tmp_path / "log")
    running.status = 1
    with pytest.raises(EngineError) as caught:
        check_alive(running, policy_of("ollama"))
    assert "chmod -R o+rX" in str(caught.value.hint)
