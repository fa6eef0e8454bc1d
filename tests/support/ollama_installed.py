"""The Ollama stand-in as it would be installed: a program on PATH, and a store of models."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from harness.engines.ollama import native
from tests.support.images import OLLAMA_PROGRAM
from tests.support.ollama import registry

CONFIG = b'{"model_format":"gguf"}'


def program(folder: Path, engine: Path, **env: str) -> Path:
    """``ollama`` in a folder, which starts ``engine`` for each load; ``env`` are knobs of the stand-in."""
    settings = " ".join(f"{key}='{value}'" for key, value in {"STANDIN_ENGINE": engine, **env}.items())
    path = folder / "ollama"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexport {settings}\nexec {sys.executable} {OLLAMA_PROGRAM} "$@"\n')
    path.chmod(0o755)
    return path


def own_ollama(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user below ``folder`` with an Ollama of their own, and no other on the machine."""
    program(folder / "bin", Path("/engine"))
    monkeypatch.setattr(native, "_SERVICE_STORES", (str(folder / "service"),))
    monkeypatch.setattr(native, "_UNITS", (str(folder / "units"),))
    monkeypatch.setattr(native, "processes", lambda _: ())
    for name, value in {"HOME": str(folder / "home"), "PATH": f"{folder / 'bin'}:/usr/bin:/bin"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    return folder


def store(folder: Path, name: str = "tiny", tag: str = "latest") -> Path:
    """A folder as ``ollama pull`` leaves it, with one model."""
    weights = registry() / "tiny.gguf"
    digest = f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    config = f"sha256:{hashlib.sha256(CONFIG).hexdigest()}"
    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights, blobs / digest.replace(":", "-"))
    (blobs / config.replace(":", "-")).write_bytes(CONFIG)
    path = folder / "manifests" / "registry.ollama.ai" / "library" / name / tag
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": weights.stat().st_size}]
    path.write_text(json.dumps({"schemaVersion": 2, "config": {"digest": config}, "layers": layers}))
    return folder


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file of a folder with its mode, size and times: what a test compares to show that nothing was touched."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))
    }
