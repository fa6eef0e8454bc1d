"""What this machine has now: GPUs and their free memory, host memory, the engine's version, models that run already.

Each thing is read once, when it is first asked for: ``harness check`` runs before every start of a model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from harness.errors import HarnessError, UnavailableError
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.units import format_size

#: The program of the embedded llama-server, which Python runs.
EMBEDDED: Final = "xllamacpp_server.py"
#: llama-server's variable for the name under which it answers; ``harness serve`` sets it.
ALIAS: Final = "LLAMA_ARG_ALIAS"
#: What a GPU that cannot be read is followed by.
ADVICE: Final = "say what is free with --available, for example --available 24GiB"


if TYPE_CHECKING:
    from harness.engines.running import RunningServer


class GpuNow(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU at this moment; bytes, ``None`` where the driver does not say, and ``why`` says why.

    ``key`` is its index, its PCI address or the engine's name. ``shared``: it uses the machine's memory.
    """

    key: str
    name: str
    uuid: str | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    driver: str | None = None
    why: str | None = None
    shared: bool = False


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A process that runs a model now."""

    pid: int
    engine: EngineName


class MachineNow:
    """This machine. ``gpu`` (an index, a UUID, or an engine's device name) leaves that GPU alone in view."""

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu
        self._running: dict[EngineName, tuple[RunningServer, ...]] = {}
        self._listed: dict[tuple[tuple[str, str], ...], tuple[GpuNow, ...] | HarnessError] = {}

    @cached_property
    def nvidia(self) -> tuple[GpuNow, ...] | HarnessError:
        """NVIDIA GPUs as the driver has them (one initialisation of NVML), or why it cannot be asked."""
        from harness.meters.nvml import gpus

        try:
            found = tuple(
                GpuNow(
                    key=str(gpu.index), name=gpu.name, uuid=gpu.uuid, free_bytes=gpu.free_bytes,
                    total_bytes=gpu.memory_bytes, driver=gpu.driver, shared=gpu.unified,
                )
                for gpu in gpus()
            )  # fmt: skip
        except HarnessError as error:
            return error
        return self._in_view(found)

    def drm(self, env: dict[str, str]) -> tuple[GpuNow, ...] | HarnessError:
        """GPUs of AMD and Intel as the kernel has them; what it does not say is taken from llama-server's list."""
        from harness.meters.drm_devices import drm_gpus, matching

        kernel = drm_gpus()
        free = {gpu.address: gpu.free_bytes for gpu in kernel}
        if any(gpu.free_bytes is None and not gpu.asleep for gpu in kernel):
            listed = self.engine_gpus(env)
            for one in () if isinstance(listed, HarnessError) else listed:
                for gpu in matching([(one.name, one.total_bytes or 0)], kernel):
                    free[gpu.address] = one.free_bytes if free[gpu.address] is None else free[gpu.address]
        return self._in_view(
            tuple(
                GpuNow(
                    key=gpu.address, name=gpu.name, uuid=gpu.address, free_bytes=free[gpu.address],
                    total_bytes=gpu.total_bytes, driver=gpu.driver, why=gpu.why, shared=gpu.integrated,
                )
                for gpu in kernel
            )
        )  # fmt: skip

    def engine_gpus(self, env: dict[str, str]) -> tuple[GpuNow, ...] | HarnessError:
        """GPUs without a driver meter, as llama-server lists them: its free memory is what its placement goes by."""
        key = tuple(sorted(env.items()))
        if key not in self._listed:
            self._listed[key] = self._list(env)
        return self._listed[key]

    def _list(self, env: dict[str, str]) -> tuple[GpuNow, ...] | HarnessError:
        from harness.engines.base import Options
        from harness.engines.llama_server.recipe import LlamaServer

        try:
            devices = LlamaServer().devices(Options(env=env, engine_binary=os.environ.get("HARNESS_ENGINE_BINARY") or None))
        except HarnessError as error:
            return error
        found = [
            GpuNow(key=name, name=title, free_bytes=free, total_bytes=total) for name, (title, total, free) in devices.items()
        ]
        return self._in_view(tuple(found))

    def _in_view(self, found: tuple[GpuNow, ...]) -> tuple[GpuNow, ...] | HarnessError:
        if not found:
            return UnavailableError("no GPU is there", hint=ADVICE, code="no-gpu")
        if self.gpu is None:
            return found
        chosen = tuple(one for one in found if self.gpu in (one.key, one.uuid))
        if chosen:
            return chosen
        there = ", ".join(f"{one.key} ({one.name})" for one in found)
        return UnavailableError(f"there is no GPU {self.gpu}; there are: {there}", code="no-such-gpu")

    @cached_property
    def host_bytes(self) -> int | None:
        """Host memory that is available: ``MemAvailable``, or less where a cgroup has a limit."""
        from harness.meters.host import available_memory

        return available_memory()

    def running(self, engine: EngineName) -> tuple[RunningServer, ...]:
        """Servers of an engine that run now and answer, asked once."""
        if engine not in self._running:
            from harness.engines.registry import running_servers

            self._running[engine] = running_servers(engine)
        return self._running[engine]

    def engine_version(self, calibration: Calibration) -> str | None:
        """The version that would run now, where that is known without starting anything."""
        if servers := self.running(calibration.engine):
            return servers[0].version
        if calibration.engine != "llama-server" or calibration.metadata.machine.sandbox != "process":
            return None
        if os.environ.get("HARNESS_ENGINE_BINARY"):
            return None
        from harness.engines.llama_server.embedded import embedded_build

        return embedded_build()


def held_by(engine: EngineName, servers: Sequence[RunningServer]) -> tuple[str, ...]:
    """What servers of an engine hold now, one sentence a model, with what to type so that it goes."""
    from harness.engines.registry import policy_of

    policy, found = policy_of(engine), []
    for server in servers:
        for model in server.models:
            part = "all" if model.gpu_bytes == model.size_bytes else format_size(model.gpu_bytes)
            gpu = f", {part} of it on the GPU" if model.gpu_bytes else ""
            context = f" at {model.context} tokens" if model.context else ""
            size = (
                "it does not say how much"
                if model.size_bytes is None
                else f"{format_size(model.size_bytes)} by its own account"
            )
            command = policy.unload_command(model.name)
            found.append(
                f"the {policy.title} that runs here (port {server.port}) holds {model.name}{context}: "
                f"{size}{gpu}{f'; to free it: {command}' if command else ''}"
            )
    return tuple(found)


def residents(calibration: Calibration, proc: Path = Path("/proc")) -> tuple[Resident, ...]:
    """Processes that have this model loaded, found by the weights or the name on their command line.

    Ollama starts its runners with ``--model …/blobs/sha256-DIGEST`` (llm/llama_server.go), in containers too.
    """
    model = calibration.metadata.model
    wanted = {model.name, Path(model.name).stem if model.name.endswith(".gguf") else model.name}
    if model.digest is not None:
        wanted.add(model.digest.replace(":", "-"))
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            engine = _engine_of(words)
            if engine is not None and _loaded(words, folder) & wanted:
                found.append(Resident(pid=int(folder.name), engine=engine))
        except OSError:
            continue  # it ended, or is another user's
    return tuple(sorted(found, key=lambda one: one.pid))


def _engine_of(words: list[str]) -> EngineName | None:
    program = Path(words[0]).name
    if program in ("ollama", "ollama_llama_server") or (program == "llama-server" and "/ollama/" in words[0]):
        return "ollama"
    if program == "llama-server" or any(Path(word).name == EMBEDDED for word in words[1:3]):
        return "llama-server"
    return "vllm" if any(Path(word).name == "vllm" for word in words[:2]) else None


def _loaded(words: list[str], folder: Path) -> set[str]:
    """Names under which a process has its model: of the file that it was started with, and of its alias."""
    names = set()
    for flag, value in pairwise(words):
        if flag in ("--model", "-m", "--alias", "-a", "serve"):
            names |= {value, Path(value).name, Path(value).stem}
    with suppress(OSError):  # of another user's process it cannot be read
        for entry in (folder / "environ").read_bytes().split(b"\0"):
            if entry.startswith(ALIAS.encode() + b"="):
                names.add(entry.partition(b"=")[2].decode("utf-8", "replace"))
    return names
