"""The Ollama stand-in as tests use it: its registry, its image, and a process of it without Docker."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from filelock import FileLock

from tests.support import models
from tests.support.images import OLLAMA_PROGRAM
from tests.support.waiting import until

#: Trained on so few tokens that Ollama has one batch for all of them.
TRAIN_CONTEXT = 4096
#: What the registry offers, by name, beside what makes each special.
_MODELS: dict[str, dict[str, object]] = {
    "tiny:latest": {},
    "embedder:latest": {"capabilities": ["embedding"]},
    "elsewhere:latest": {"remote_host": "https://ollama.com:443"},
    "mlx:latest": {"format": "safetensors"},
}


def registry() -> Path:
    """A folder that the stand-in pulls from. Written once for each environment, so that its image stays the same."""
    version = hashlib.sha256(Path(models.__file__).read_bytes()).hexdigest()[:8]
    folder = Path(sys.prefix) / "share" / "harness-tests" / f"ollama-registry-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "tiny.gguf").exists():
            models.write_tiny_llama(folder / "tiny.part", TRAIN_CONTEXT).replace(folder / "tiny.gguf")
        text = json.dumps({name: {"file": "tiny.gguf", **special} for name, special in _MODELS.items()})
        if not (folder / "registry.json").exists() or (folder / "registry.json").read_text() != text:
            (folder / "registry.json").write_text(text)
    return folder


@contextlib.contextmanager
def standin(folder: Path, **env: str) -> Iterator[httpx.Client]:
    """A stand-in that runs as a process with its models in ``folder``, and a client of it; its log is ``folder/log``."""
    settings = {
        "OLLAMA_HOST": "127.0.0.1:0",
        "OLLAMA_MODELS": str(folder / "models"),
        "STANDIN_REGISTRY": str(registry()),
        **env,
    }
    with (folder / "log").open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            [sys.executable, str(OLLAMA_PROGRAM), "serve"], env={**os.environ, **settings}, stdout=log, stderr=log
        )

    def listens() -> re.Match[str] | None:
        said = (folder / "log").read_text(errors="replace")[began:]
        assert process.poll() is None, said
        return re.search(r"Listening on \S+:(\d+) ", said)

    try:
        port = until(listens, "the stand-in")[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=200.0) as client:
            yield client
    finally:
        process.terminate()
        process.wait()
