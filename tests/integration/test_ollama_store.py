"""The store that a container is lent, and the version of a program."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.engines.base import Options, Source
from harness.engines.ollama import native
from harness.engines.ollama.recipe import Ollama
from harness.errors import NotPermittedError
from harness.model.record import Model
from tests.support.ollama import standin
from tests.support.ollama_installed import own_ollama, store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with an Ollama of their own, and no other on the machine."""
    return own_ollama(tmp_path, monkeypatch)


def quiet(what: str, done: float, total: float | None) -> None:
    """Progress that is not shown."""


def test_a_container_is_lent_only_what_its_root_may_read(home: Path) -> None:
    """Without any capability, root has no right over files of another account."""
    assert native.lendable("tiny", os.environ) is None
    folder = store(home / "home" / ".ollama" / "models")
    assert native.lendable("tiny", os.environ) == folder
    assert Ollama().resolve("tiny", Options()).lent == folder
    assert Ollama().resolve("tiny", Options(models="volume")).lent is None
    blob = max((folder / "blobs").iterdir(), key=lambda one: one.stat().st_size)
    if os.geteuid() == 0:
        os.chown(blob, 1000, 1000)
    blob.chmod(0o600)
    assert native.lendable("tiny", os.environ) is None
    with standin(home) as client, pytest.raises(NotPermittedError, match="another account") as caught:
        Ollama().prepare(client, Source(model=Model(name="tiny"), own_name="tiny"), Options(models=str(folder)), quiet)
    assert "o+rX" in str(caught.value.hint)
    blob.unlink()
    blob.symlink_to("/dev/null")
    assert native.lendable("tiny", os.environ) is None, "where a link leads is not mounted"


def test_the_program_s_own_version_is_told_and_not_a_server_s(tmp_path: Path) -> None:
    binary = tmp_path / "ollama"
    binary.write_text(
        '#!/bin/sh\n[ "$OLLAMA_HOST" = 127.0.0.1:1 ] && echo "Warning: client version is 0.33.0" && exit\n'
        'echo "ollama version is 9.9.9"\n'
    )
    binary.chmod(0o755)
    assert Ollama().version(Options(engine_binary=str(binary)), None).version == "0.33.0"
    binary.write_text("#!/bin/sh\nexit 3\n")
    assert Ollama().version(Options(engine_binary=str(binary)), None).version is None
