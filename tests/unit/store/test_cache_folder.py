"""Where models are put together, with and without a home."""

from __future__ import annotations

import sys
from pathlib import Path

import platformdirs
import pytest

from harness.store.catalog import cache_folder


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_the_users_cache_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache_folder() == tmp_path / ".cache/harness"


def test_the_setting_goes_before_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "chosen"))

    assert cache_folder() == tmp_path / "chosen"


def test_a_home_that_cannot_be_written_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # below a file not even root can write
    monkeypatch.setenv("HOME", str(tmp_path / "file/home"))

    assert cache_folder() == Path(sys.prefix) / "share/harness"


def test_a_home_that_nobody_knows_is_not_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a user id without an entry in /etc/passwd the path begins with a bare "~"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/harness")

    assert cache_folder() == Path(sys.prefix) / "share/harness"
