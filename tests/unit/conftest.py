"""A unit test starts no process but the programs that it ``requires``; what does belongs to ``tests/integration``."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("requires"):
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test starts no process: it belongs to tests/integration")

    for starter in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        monkeypatch.setattr(starter, refuse)
