"""From what the user run to a run: model, engine, sandbox and meter, chosen once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import msgspec

from harness.engines import gguf
from harness.engines.base import Engine, Options, Source
from harness.engines.registry import recipe_of
from harness.engines.running import RunningServer, held_by
from harness.errors import UnavailableError
from harness.inventory.backend import Choice, choose, choose_engine, choose_sandbox, elsewhere, resolve_name
from harness.inventory.machine import MachineNow
from harness.measure import calibrate as workflow
from harness.measure.events import Observer
from harness.measure.load import StageHook, no_hook
from harness.meters.base import Meter
from harness.model.record import Model
from harness.options import RunOptions, shared
from harness.sandboxes.base import GpuRequest, Sandbox
from harness.sandboxes.locks import hold
from harness.store.catalog import DEFAULT_MODEL, find_catalog, pinned_image, read_catalog
from harness.store.store import Store


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration that could begin now."""

    engine: Engine
    choice: Choice
    options: Options
    request: workflow.Request
    store: Store

    def plan(self) -> workflow.CalibrationPlan:
        """What it would do."""
        return workflow.plan(self.engine, self.request, self.store, self.options)

    def calibrate(self, observer: Observer, hook: StageHook = no_hook) -> workflow.Result:
        """Do it, with a sandbox and a meter of its own."""
        self.plan()  # a context that is refused is refused before a file is hashed
        with ExitStack() as stack:
            stack.enter_context(hold(lock_names(self.choice)))
            try:
                sandbox = open_sandbox(self.choice, stack, observer)
            except UnavailableError as error:
                if error.code.startswith("docker-"):
                    error.hint = elsewhere(self.engine, self.options, error.hint)
                raise
            meter = open_meter(self.choice)
            stack.callback(meter.close)
            request = self.request
            if request.source.path is not None and request.source.model.digest is None:
                observer.progress("hashing the model", 0, None)
                digest = gguf.sha256(request.source.path)
                model = msgspec.structs.replace(request.source.model, digest=digest)
                request = msgspec.structs.replace(request, source=msgspec.structs.replace(request.source, model=model))
            return workflow.calibrate(
                self.engine, sandbox, meter, self.choice, self.options, request, self.store, observer, hook=hook
            )


def prepare(run: RunOptions, store: Store, here: Path) -> Session:
    """Resolve everything that can fail without starting an engine.

    Raises:
        HarnessError: the model, engine, sandbox, GPU or store cannot be had.
    """
    name = run.model or DEFAULT_MODEL
    options = Options(**{**shared(run), "gpus": GpuRequest.parse(run.gpus)})
    catalog = read_catalog(find_catalog(here))
    engine_name, reasons = choose_engine(run.engine, run.sandbox, options, name, catalog)
    engine = recipe_of(engine_name)
    place, why = choose_sandbox(engine, run.sandbox, options)
    options = msgspec.structs.replace(options, sandbox=place)
    reasons = (*reasons, *why)
    own_name = resolve_name(name, engine, catalog, options)
    source = engine.resolve(own_name, options)
    if not name.endswith(".gguf"):
        name = name.partition("@sha256:")[0]  # a digest pins a model; it is no part of its name
        source = msgspec.structs.replace(source, model=_named(source.model, workflow.model_stem(name)))
    else:
        source = msgspec.structs.replace(source, model=_named(source.model, Path(name).name))
    source = _with_overrides(source, options)
    choice = choose(engine, place, options, reasons)
    if choice.sandbox == "docker":
        options = msgspec.structs.replace(options, image=options.image or pinned_image(engine.name, here))
        reasons = (f"image {options.image or 'unknown'}",)
    else:
        reasons = ()
    servers = MachineNow().running(engine.name)
    held = held_by(engine.name, servers) if choice.target == "gpu" else ()
    if servers and choice.sandbox == "process":
        held = (*_other_versions(engine, options, servers), *held)
    choice = msgspec.structs.replace(choice, reasons=(*choice.reasons, *reasons, *held))
    request = workflow.Request(
        name=name,
        source=source,
        contexts=run.contexts,
        loads=run.loads,
        num_batch=run.num_batch,
        variant=run.variant,
        speed=run.speed,
        force=run.force,
    )
    options = msgspec.structs.replace(options, target=choice.target, memory_limit=memory_budget(choice))
    return Session(engine=engine, choice=choice, options=options, request=request, store=store)


def _other_versions(engine: Engine, options: Options, servers: tuple[RunningServer, ...]) -> tuple[str, ...]:
    """That a server which runs here is of another version than the program that will be measured."""
    version = engine.version(options, None).version
    return tuple(
        f"the {engine.policy.title} that runs here (port {one.port}) is {one.version}, the program measured now {version}"
        for one in servers
        if version is not None and one.version != version
    )


def memory_budget(choice: Choice) -> int | None:
    """What an engine on the host may take: nine tenths of what is available, so that the machine lives on."""
    if choice.target != "host":
        return None
    from harness.meters.host import available_memory

    available = available_memory()
    return None if available is None else available // 10 * 9


def _named(model: Model, name: str) -> Model:
    return msgspec.structs.replace(model, name=name)


def _with_overrides(source: Source, options: Options) -> Source:
    """Honour ``LLAMA_ARG_OVERRIDE_KV``: a context length that the user overrides is the model's now."""
    override = options.env.get("LLAMA_ARG_OVERRIDE_KV", "")
    for item in override.split(","):
        key, _, value = item.partition("=")
        if key == f"{source.model.architecture}.context_length" and value.startswith("int:") and value[4:].isdigit():
            model = msgspec.structs.replace(source.model, train_context=int(value[4:]))
            return msgspec.structs.replace(source, model=model)
    return source


def lock_names(choice: Choice) -> tuple[str, ...]:
    """What a run must have to itself: its GPUs, by UUID, or by name where they have none.

    Host memory is shared: what a process holds there is its own, whatever others do.
    """
    return tuple(gpu.uuid or gpu.name for gpu in choice.gpus)


def open_sandbox(choice: Choice, stack: ExitStack, observer: Observer) -> Sandbox:
    """The sandbox of a choice, with the reaper that outlives us."""
    from harness.sandboxes.reaper import Reaper

    reaper = stack.enter_context(Reaper())
    if choice.sandbox == "process":
        from harness.sandboxes.process import ProcessSandbox

        sandbox: Sandbox = ProcessSandbox(reaper)
    else:
        from harness.sandboxes.docker import DockerSandbox

        sandbox = DockerSandbox(reaper, progress=observer.progress)
    stack.callback(sandbox.close)
    return sandbox


def open_meter(choice: Choice) -> Meter:
    """The meter of a choice."""
    if choice.meter == "host":
        from harness.meters.host import HostMeter

        return HostMeter()
    if choice.meter == "log":
        from harness.meters.log import LogMeter

        return LogMeter()
    if choice.meter == "drm":
        from harness.meters.drm import DrmMeter

        return DrmMeter([gpu.uuid for gpu in choice.gpus if gpu.uuid])
    from harness.meters.nvml import NvmlMeter

    return NvmlMeter([gpu.uuid for gpu in choice.gpus if gpu.uuid])
