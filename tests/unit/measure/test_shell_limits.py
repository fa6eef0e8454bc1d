"""Why an engine ended, and what to do about it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from harness.engines.registry import policy_of
from harness.errors import EngineError, WontFitError
from harness.measure.engine_log import check_alive
from tests.support.fakes import FakeRunning, World
from tests.support.true_model import TrueModel


@pytest.mark.parametrize(("limit", "kind"), [(resource.RLIM_INFINITY, WontFitError), (1 << 30, EngineError)])
def test_a_shell_that_limits_memory_is_named_in_place_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, kind: type[EngineError]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    (tmp_path / "log").write_text("terminate called: std::bad_alloc\n")
    running = FakeRunning(World(TrueModel(weights=1, overhead=1, kv_per_cell=1)), tmp_path / "log")
    running.status = 134
    with pytest.raises(kind) as caught:
        check_alive(running, policy_of("llama-server"))
    assert ("ulimit -v" in caught.value.message) is (kind is EngineError)
