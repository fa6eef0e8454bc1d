"""What ``auto`` means here: which engine, sandbox, meter and target; said aloud, and never changed silently afterwards."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.engines.base import Engine, Options
from harness.engines.llama_server.recipe import LlamaServer
from harness.errors import NotFoundError, UnavailableError, UsageError
from harness.inventory.drm import kernel_gpus, recorded, used_by_default
from harness.inventory.nvidia import docker_gpu_obstacle, driven_gpus, nvidia_gpus
from harness.model.facts import EngineName
from harness.model.record import Gpu, Machine, Target
from harness.model.trace import MeterName
from harness.options import SandboxChoice
from harness.sandboxes.base import GpuRequest, SandboxName
from harness.store.catalog import Catalog, gguf_path
from harness.units import gib

#: ``auto``, or the name of an engine.
EngineChoice = str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a run will use; ``reasons`` are for the user."""

    engine: EngineName
    sandbox: SandboxName
    meter: MeterName
    target: Target
    gpus: tuple[Gpu, ...]
    reasons: tuple[str, ...]

    def machine(self) -> Machine:
        """The machine section of the record."""
        return Machine(target=self.target, sandbox=self.sandbox, meter=self.meter, gpus=self.gpus)


def choose_engine(wanted: EngineChoice, sandbox: SandboxChoice, options: Options) -> tuple[EngineName, tuple[str, ...]]:
    """``auto``: Ollama where a container can be given an NVIDIA GPU, else llama-server on what the machine has; and why."""
    if wanted != "auto":
        return wanted, ()
    if sandbox == "process":
        return "llama-server", ("engine llama-server: processes were asked for",)
    if options.gpus.mode == "none":
        return "llama-server", ("engine llama-server: no GPU is to be used",)
    if options.engine_binary is not None:
        return "llama-server", ("engine llama-server: a binary was named",)
    obstacle = docker_gpu_obstacle()
    if obstacle is None:
        return "ollama", ("engine ollama: Docker can give a container an NVIDIA GPU",)
    return "llama-server", (f"engine llama-server on this machine: {obstacle}",)


def choose(engine: Engine, sandbox: SandboxChoice, options: Options, reasons: tuple[str, ...] = ()) -> Choice:
    """Sandbox, target and meter for an engine.

    Raises:
        UsageError: the engine does not run in that sandbox. UnavailableError: a GPU was asked for that is not there.
    """
    if sandbox != "auto" and sandbox not in engine.sandboxes:
        raise UsageError(f"{engine.name} does not run in sandbox {sandbox}")
    place: SandboxName = engine.sandboxes[0] if sandbox == "auto" else sandbox
    if isinstance(engine, LlamaServer) and place == "process":
        return _choose_process(engine, options, reasons)
    return _choose_driver(engine, place, options, reasons)


def _choose_process(engine: LlamaServer, options: Options, reasons: tuple[str, ...]) -> Choice:
    devices = engine.devices(options)
    if options.gpus.mode == "ids":
        missing = [
            one for one in options.gpus.ids if one[0].isalpha() and not one.startswith(("GPU-", "MIG-")) and one not in devices
        ]
        if missing:
            there = ", ".join(devices) or "none"
            raise UnavailableError(f"no such device: {', '.join(missing)} (the engine sees: {there})", code="no-such-gpu")
    if not devices and options.gpus.mode == "ids":
        raise UnavailableError(f"no such GPU: {', '.join(options.gpus.ids)} (the engine sees none)", code="no-such-gpu")
    if not devices:
        why = "no GPU is to be used" if options.gpus.mode == "none" else "the engine sees no GPU"
        return Choice(
            engine=engine.name, sandbox="process", meter="host", target="host", gpus=(),
            reasons=(*reasons, f"target host: {why}"),
        )  # fmt: skip
    used = {name: facts for name, facts in devices.items() if name in options.gpus.ids} or used_by_default(devices)
    names = ", ".join(f"{name} ({facts[0]})" for name, facts in used.items())
    by_cuda = all(name.startswith("CUDA") for name in used)
    driven = () if by_cuda else driven_gpus([facts[0] for facts in used.values()])
    if by_cuda or driven:
        asked = msgspec.structs.replace(options, gpus=GpuRequest(mode="ids", ids=driven)) if driven else options
        chosen, meter, how = nvidia_gpus(asked)
        return Choice(
            engine=engine.name, sandbox="process", meter=meter, target="gpu", gpus=chosen,
            reasons=(*reasons, f"target gpu: {names}, {how}"),
        )  # fmt: skip
    if kernel := kernel_gpus(used):
        return Choice(
            engine=engine.name, sandbox="process", meter="drm", target="gpu", gpus=recorded(kernel),
            reasons=(*reasons, f"target gpu: {names}, measured by the kernel's own count (DRM)"),
        )  # fmt: skip
    gpus = tuple(Gpu(name=title, memory_gb=gib(total)) for title, total, _ in used.values())
    return Choice(
        engine=engine.name, sandbox="process", meter="log", target="gpu", gpus=gpus,
        reasons=(*reasons, f"target gpu: {names}; no driver meter there, so memory is logged, not measured"),
    )  # fmt: skip


def _choose_driver(engine: Engine, place: SandboxName, options: Options, reasons: tuple[str, ...]) -> Choice:
    if options.gpus.mode == "none":
        return Choice(
            engine=engine.name, sandbox=place, meter="host", target="host", gpus=(),
            reasons=(*reasons, "target host: no GPU is to be used"),
        )  # fmt: skip
    try:
        chosen, meter, how = nvidia_gpus(options)
    except UnavailableError as error:
        if engine.name == "ollama":
            error.hint = error.hint or "without a GPU: --gpus none measures Ollama on host memory"
        raise
    names = ", ".join(gpu.name for gpu in chosen)
    return Choice(
        engine=engine.name, sandbox=place, meter=meter, target="gpu", gpus=chosen,
        reasons=(*reasons, f"target gpu: {names}, {how}"),
    )  # fmt: skip


def resolve_name(name: str, engine: Engine, catalog: Catalog) -> str:
    """What an engine calls a model of the catalog; other names are returned as they are.

    Raises:
        NotFoundError: the catalog knows the model, and not for this engine.
    """
    entry = catalog.models.get(name)
    if engine.name == "llama-server":
        if entry is not None and entry.gguf is not None:
            return str(gguf_path(name, entry))
        if Path(name).expanduser().exists() or name.endswith(".gguf"):
            return name
        here = ", ".join(sorted(key for key, one in catalog.models.items() if one.gguf is not None)) or "none"
        raise NotFoundError(
            f"llama-server cannot reach {name!r}: it loads GGUF files",
            hint=f"works here: {here}, or the path of a .gguf file. {name} by Ollama needs Docker and an NVIDIA GPU, "
            "or --engine ollama --gpus none with Docker alone",
            code="no-such-model",
        )
    if entry is None:
        return name
    known = entry.ollama if engine.name == "ollama" else entry.vllm
    if known is None:
        raise NotFoundError(f"the catalog knows no {name!r} for {engine.name}", code="no-such-model")
    return known
