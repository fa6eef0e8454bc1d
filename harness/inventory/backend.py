"""What ``auto`` means here: which engine, sandbox, meter and target; logged, and never changed silently afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.base import Engine, Options
from harness.engines.registry import CONTAINED, EMBEDDED, recipe_of
from harness.errors import HarnessError, NotFoundError, UnavailableError, UsageError
from harness.inventory.docker import docker_gpu_obstacle, docker_obstacle
from harness.inventory.gpus import driven_gpus, nvidia_gpus, used_by_default
from harness.model.facts import EngineName
from harness.model.gpu import LocalGpu
from harness.model.record import Gpu, Machine, Target
from harness.model.trace import MeterName
from harness.options import SandboxChoice
from harness.sandboxes.base import GpuRequest, SandboxName
from harness.store.catalog import Catalog, gguf_path, is_here

_BY_KERNEL: Final = "measured by the kernel's own count (DRM)"
#: ``auto``, or the name of an engine.
EngineChoice = str


class Backend(msgspec.Struct, frozen=True, kw_only=True):
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


def choose_engine(
    wanted: EngineChoice, sandbox: SandboxChoice, options: Options, name: str = "", catalog: Catalog | None = None
) -> tuple[EngineName, tuple[str, ...]]:
    """``auto``: Ollama in Docker with an NVIDIA GPU, else this machine's Ollama with a GPU, else llama-server; and why.

    This machine's Ollama is taken only for a model ``name`` that it has.
    """
    if wanted != "auto":
        return wanted, ()
    if options.gpus.mode == "none":
        return EMBEDDED, (f"engine {EMBEDDED}: no GPU is to be used",)
    if options.engine_binary is not None:
        return EMBEDDED, (f"engine {EMBEDDED}: a binary was named",)
    obstacles = []
    if sandbox != "process":
        obstacle = docker_gpu_obstacle()
        if obstacle is None:
            return CONTAINED, (f"engine {CONTAINED}: Docker can give a container an NVIDIA GPU",)
        obstacles.append(obstacle)
    else:
        obstacles.append("processes were asked for")
    if sandbox != "docker":
        engine = recipe_of(CONTAINED)
        native = _native_obstacle(engine, name, catalog or Catalog(), options)
        if native is None:
            program = engine.installed(options)[0]
            return CONTAINED, (f"engine {CONTAINED}: {program} on this machine, with its GPU; {obstacles[0]}",)
        obstacles += [native] if native else []
    return EMBEDDED, (f"engine {EMBEDDED} on this machine: {'; '.join(obstacles)}",)


def _native_obstacle(engine: Engine, name: str, catalog: Catalog, options: Options) -> str | None:
    """Why an engine's own program here does not run a model on a GPU; empty where there is no such program."""
    options = msgspec.structs.replace(options, sandbox="process")
    try:
        if not engine.installed(options):
            return ""
        _choose_driver(engine, "process", options, ())
        engine.resolve(resolve_name(name, engine, catalog, options), options)
    except HarnessError as error:
        return f"not this machine's {engine.name}: {error.message}"
    return None


def choose_sandbox(engine: Engine, wanted: SandboxChoice, options: Options) -> tuple[SandboxName, tuple[str, ...]]:
    """Where an engine runs, and why. ``auto``: as its options say, else the first of its sandboxes that can be had.

    Raises:
        UsageError: it does not run there, or an option is for another sandbox. UnavailableError: it runs nowhere here.
    """
    if wanted != "auto" and wanted not in engine.sandboxes:
        raise UsageError(f"{engine.name} does not run in sandbox {wanted}", hint=f"--sandbox {engine.sandboxes[0]}")
    if options.image is not None and (wanted == "process" or options.engine_binary is not None):
        raise UsageError(
            "--image (HARNESS_IMAGE) is for sandbox docker, not for a process", hint="leave it out", code="other-sandbox"
        )
    if options.engine_binary is not None and wanted == "docker":
        what = "--engine-binary (HARNESS_ENGINE_BINARY) is for sandbox process"
        raise UsageError(what, hint="--image names the engine of a container", code="other-sandbox")
    if wanted != "auto":
        return wanted, ()
    if options.image is not None and "docker" in engine.sandboxes:
        return "docker", ()
    if (options.engine_binary is not None and "process" in engine.sandboxes) or engine.sandboxes[0] == "process":
        return "process", ()
    obstacle = docker_obstacle() if options.gpus.mode == "none" else docker_gpu_obstacle()
    if obstacle is None:
        return "docker", ()
    if installed := engine.installed(options):
        return "process", (f"sandbox process: {installed[0]} on this machine; {obstacle}",)
    if options.gpus.mode == "all" and docker_obstacle() is None:
        return "docker", ()  # what is missing is the GPU, and that is said next
    raise UnavailableError(
        f"{engine.name} cannot run here: {obstacle}, and its program is not installed",
        hint=f"start Docker (as root: systemctl start docker), or install {engine.name} on this machine",
        code="no-engine",
    )


def elsewhere(engine: Engine, options: Options, hint: str | None) -> str | None:
    """What to do where Docker cannot be used: a process too, where the engine's program is installed."""
    try:
        there = bool(engine.installed(msgspec.structs.replace(options, engine_binary=None)))
    except HarnessError:
        there = False
    return f"{hint}, or --sandbox process" if hint and there and "process" in engine.sandboxes else hint


def choose(engine: Engine, sandbox: SandboxChoice, options: Options, reasons: tuple[str, ...] = ()) -> Backend:
    """Sandbox, target and meter for an engine.

    Raises:
        UsageError: the engine does not run in that sandbox. UnavailableError: it runs nowhere here, or a GPU that was asked
            for is not there.
    """
    place, why = choose_sandbox(engine, sandbox, options)
    reasons = (*reasons, *why)
    devices = engine.devices(options) if place == "process" else None
    if devices is not None:
        return _choose_process(engine, devices, options, reasons)
    return _choose_driver(engine, place, options, reasons)


def _choose_process(engine: Engine, devices: tuple[LocalGpu, ...], options: Options, reasons: tuple[str, ...]) -> Backend:
    there = {gpu.key for gpu in devices}
    if options.gpus.mode == "ids":
        missing = [
            one for one in options.gpus.ids if one[0].isalpha() and not one.startswith(("GPU-", "MIG-")) and one not in there
        ]
        if missing:
            names = ", ".join(gpu.key for gpu in devices) or "none"
            raise UnavailableError(f"no such device: {', '.join(missing)} (the engine sees: {names})", code="no-such-gpu")
    if not devices and options.gpus.mode == "ids":
        raise UnavailableError(f"no such GPU: {', '.join(options.gpus.ids)} (the engine sees none)", code="no-such-gpu")
    if not devices:
        why = "no GPU is to be used" if options.gpus.mode == "none" else "the engine sees no GPU"
        return _on_host(engine, "process", reasons, why)
    used = tuple(gpu for gpu in devices if gpu.key in options.gpus.ids) or used_by_default(devices)
    names = ", ".join(f"{gpu.key} ({gpu.name})" for gpu in used)
    by_cuda = all(gpu.key.startswith("CUDA") for gpu in used)
    driven = () if by_cuda else driven_gpus(used)
    if by_cuda or driven:
        ids = tuple(gpu.uuid for gpu in driven if gpu.uuid)
        asked = msgspec.structs.replace(options, gpus=GpuRequest(mode="ids", ids=ids)) if driven else options
        chosen, meter, how = nvidia_gpus(asked)
        return _on_gpus(engine, "process", meter, chosen, (*reasons, f"target gpu: {names}, {how}"))
    from harness.meters.drm_devices import drm_gpus, matching

    if kernel := matching(used, drm_gpus()):
        return _on_gpus(engine, "process", "drm", kernel, (*reasons, f"target gpu: {names}, {_BY_KERNEL}"))
    how = "no driver meter there, so memory is logged, not measured"
    return _on_gpus(engine, "process", "log", used, (*reasons, f"target gpu: {names}; {how}"))


def _choose_driver(engine: Engine, place: SandboxName, options: Options, reasons: tuple[str, ...]) -> Backend:
    if options.gpus.mode == "none":
        return _on_host(engine, place, reasons, "no GPU is to be used")
    try:
        chosen, meter, how = nvidia_gpus(options)
    except UnavailableError as error:
        used = _kernel_gpus(engine, options) if place == "process" else ()
        if used:
            names = ", ".join(f"{gpu.name} at {gpu.key}" for gpu in used)
            return _on_gpus(engine, place, "drm", used, (*reasons, f"target gpu: {names}, {_BY_KERNEL}"))
        error.hint = error.hint or f"without a GPU: --gpus none measures {engine.name} on host memory"
        raise
    names = ", ".join(gpu.name for gpu in chosen)
    return _on_gpus(engine, place, meter, chosen, (*reasons, f"target gpu: {names}, {how}"))


def _on_host(engine: Engine, place: SandboxName, reasons: tuple[str, ...], why: str) -> Backend:
    return Backend(
        engine=engine.name, sandbox=place, meter="host", target="host", gpus=(), reasons=(*reasons, f"target host: {why}")
    )


def _on_gpus(
    engine: Engine, place: SandboxName, meter: MeterName, gpus: Sequence[LocalGpu], reasons: tuple[str, ...]
) -> Backend:
    recorded = tuple(gpu.recorded for gpu in gpus)
    return Backend(engine=engine.name, sandbox=place, meter=meter, target="gpu", gpus=recorded, reasons=reasons)


def _kernel_gpus(engine: Engine, options: Options) -> tuple[LocalGpu, ...]:
    """GPUs of AMD and Intel that an engine uses of its own accord: integrated ones only beside no other."""
    from harness.meters.drm_devices import drm_gpus

    if options.gpus.mode != "all":
        return ()
    found = [gpu for gpu in drm_gpus() if not engine.leaves_alone(gpu.shared, gpu.gfx, options.env)]
    return tuple([gpu for gpu in found if not gpu.shared] or found)


def resolve_name(name: str, engine: Engine, catalog: Catalog, options: Options) -> str:
    """What an engine calls a model of the catalog; other names are returned as they are. ``options`` are for the hint alone.

    Raises:
        NotFoundError: the catalog knows the model, and not for this engine.
    """
    entry = catalog.models.get(name)
    if engine.policy.loads_files:
        if entry is not None and entry.gguf is not None:
            return str(gguf_path(name, entry))
        if Path(name).expanduser().exists() or name.endswith(".gguf"):
            return name
        here = sorted(key for key, one in catalog.models.items() if is_here(one))
        hint = f"works here: {', '.join((*here, 'or the path of a .gguf file' if here else 'the path of a .gguf file'))}"
        if name.startswith(("https://", "hf.co/", "hf://")):
            hint = f"its memory can be measured without a download: --header-only; or: {hint}"
        raise NotFoundError(
            f"{engine.policy.title} cannot reach {name!r}: it loads GGUF files", hint=f"{hint}; {_contained(name, options)}",
            code="no-such-model",
        )  # fmt: skip
    if entry is None:
        return name
    known = entry.name_for(engine.name)
    if known is None:
        raise NotFoundError(f"the catalog has no {name!r} for {engine.name}", code="no-such-model")
    return known


def header_address(name: str, engine: Engine, catalog: Catalog) -> str:
    """Where the header of a model is read: of a catalog name as the catalog says, else the name itself.

    Raises:
        NotFoundError: the catalog knows the model, and no source of its header.
    """
    entry = catalog.models.get(name)
    if entry is None:
        return name
    if engine.policy.loads_files and entry.gguf is not None and (entry.gguf.path is None or entry.source is None):
        return str(gguf_path(name, entry))
    known = (None if engine.policy.loads_files else entry.name_for(engine.name)) or entry.source or entry.name_for(CONTAINED)
    if known is None:
        raise NotFoundError(f"the catalog names no source of {name!r}", hint="source: hf.co/OWNER/REPO", code="no-such-model")
    return known


def _contained(name: str, options: Options) -> str:
    """How :data:`CONTAINED` could take a name that an engine of files does not know: only what is not refused then."""
    engine = recipe_of(CONTAINED)
    title = engine.policy.title
    for gpus in dict.fromkeys((options.gpus, GpuRequest(mode="none"))):
        asked = msgspec.structs.replace(options, image=None, engine_binary=None, gpus=gpus)
        try:
            place, _ = choose_sandbox(engine, "auto", asked)
            choose(engine, place, asked)
            engine.resolve(name, msgspec.structs.replace(asked, sandbox=place))
        except HarnessError:
            continue
        return f"by {title}: --engine {engine.name} --sandbox {place}{' --gpus none' if gpus.mode == 'none' else ''}"
    return f"{name} by {title} needs Docker, or an {title} on this machine that has it"
