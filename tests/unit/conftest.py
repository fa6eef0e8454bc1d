"""A unit test starts no process: one that has to (a script, the reaper, a lock of another process) is marked ``process``."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(request.node.get_closest_marker(name) for name in ("process", "requires")):
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test starts no process; mark it with process if that is what it tests")

    for starter in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        monkeypatch.setattr(starter, refuse)
