"""Servers of Ollama that run on this machine, whoever started them: where they listen, what they hold, how they are set.

Light on purpose: ``harness check`` asks before every start of a model. Nothing is asked of a server but its version and what it
holds (``GET /api/version``, ``GET /api/ps``).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from harness.engines.ollama.policy import VISIBLE
from harness.engines.policy import LLAMA_MEMORY, LLAMA_PLACING
from harness.engines.running import RunningModel, RunningServer
from harness.text import one_line

#: ``OLLAMA_HOST`` of an Ollama on this machine (envconfig.Host); unset is port 11434 here.
_HOST: Final = re.compile(r"(?:(?:http://)?(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1?\])?(?::(?P<port>\d{1,5}))?/?)")
_PORT: Final = 11434
#: How long an Ollama on this machine may take to answer, seconds.
_ANSWER: Final = 0.3
#: The private folder of a server that harness started (sandboxes/reaper_main.py).
_OURS: Final = re.compile(r"/harness-private-[0-9a-f]{16}/models$")
#: Its variables that decide how much memory a model takes.
SETTINGS: Final = (
    *("OLLAMA_NUM_PARALLEL", "OLLAMA_KV_CACHE_TYPE", "OLLAMA_FLASH_ATTENTION", "OLLAMA_CONTEXT_LENGTH", "OLLAMA_GPU_OVERHEAD"),
    *("OLLAMA_SCHED_SPREAD", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MODELS", "OLLAMA_VULKAN", "OLLAMA_IGPU_ENABLE"),
    *(*VISIBLE, *LLAMA_PLACING, *LLAMA_MEMORY),
)


def processes(proc: Path = Path("/proc")) -> tuple[RunningServer, ...]:
    """Processes ``ollama serve`` of this machine, containers' too; settings where this user may read them."""
    found = []
    for folder in proc.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) < 2 or words[1] != b"serve" or Path(os.fsdecode(words[0])).name != "ollama":
            continue
        env: dict[str, str] = {}
        try:
            for entry in (folder / "environ").read_bytes().split(b"\0"):
                key, _, value = os.fsdecode(entry).partition("=")
                env[key] = value
        except OSError:
            env = {}
        if _OURS.search(env.get("OLLAMA_MODELS", "")):
            continue  # a server that harness started
        match = _HOST.fullmatch(env.get("OLLAMA_HOST", "").strip())
        port = int(match["port"] or _PORT) if match else None
        settings = {key: env[key] for key in SETTINGS if env.get(key)}
        found.append(RunningServer(pid=int(folder.name), port=port, settings=settings, readable=bool(env)))
    return tuple(sorted(found, key=lambda one: one.pid or 0))


def running(host: str, proc: Path = Path("/proc")) -> tuple[RunningServer, ...]:
    """Servers that run now and answer, with their versions and models. ``host`` is ``OLLAMA_HOST`` of this user."""
    known = {one.port: one for one in processes(proc) if one.port is not None}
    match = _HOST.fullmatch(host.strip())
    if match is not None:
        port = int(match["port"] or _PORT)
        known.setdefault(port, RunningServer(pid=None, port=port))
    found = []
    for port, server in known.items():
        version = _ask(port or 0, "/api/version").get("version")
        if not isinstance(version, str) or not re.fullmatch(r"[0-9A-Za-z.+-]{1,40}", version):
            continue
        models = _ask(port or 0, "/api/ps").get("models")
        loaded = tuple(_model(one) for one in models if isinstance(one, dict)) if isinstance(models, list) else ()
        found.append(msgspec.structs.replace(server, version=version, models=loaded))
    return tuple(found)


def _model(entry: dict[str, Any]) -> RunningModel:
    def count(key: str) -> int | None:
        """Of a model on the CPU it says 0 for both sizes, which is no size."""
        value = entry.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    name = str(entry.get("name") or entry.get("model") or "")
    return RunningModel(
        name=one_line(name), size_bytes=count("size"), gpu_bytes=count("size_vram"), context=count("context_length")
    )


def _ask(port: int, path: str) -> dict[str, Any]:
    """``GET path`` of a server on this machine, without a third-party client: ``check`` runs before every start of a model."""
    import socket

    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER) as link:
            link.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            while (part := link.recv(65536)) and len(answer) < 1 << 20:
                answer += part
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (OSError, OverflowError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
