"""An engine, a sandbox and a meter that live in memory: the runner is driven through the front door, and no process starts.

One :class:`World` stands behind all three. It knows what the model truly takes (:class:`tests.support.true_model.TrueModel`),
writes the log that llama.cpp would write, tells the meter what is held, and lists what happened in its order. A test makes
something go wrong with ``world.plots``: what to do when a named event happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest

import harness
from harness.engines.base import DryRunEnd, Engine, Options, Progress, Source
from harness.engines.policy import Policy
from harness.engines.registry import policy_of
from harness.errors import EngineError
from harness.fit.load_plan import BatchLimits
from harness.inventory.backend import Backend
from harness.measure.calibrate import Result
from harness.measure.events import Observer
from harness.model.facts import EngineName
from harness.model.record import EngineVersion, Gpu, LoadRequest, Model, Reported, Speed, Target, Tensors
from harness.model.trace import MeterName, Occupancy, Reading
from harness.sandboxes.base import ImageFacts, Launch, SandboxName, Site
from harness.store.store import read_record
from harness.units import MIB, pad_cells
from tests.support.true_model import TrueModel

if TYPE_CHECKING:
    import httpx

#: PIDs of the engine's server and of the process that holds a model; they belong to no process of this machine.
SERVER, HOLDER = 2**22 + 11, 2**22 + 12
#: What the driver's pools grow by at the first real prompt.
POOL = 6 * MIB
LAYERS = 16
DEVICE = "GPU-0f0e0d0c"


class World:
    """What an engine, its sandbox and a meter agree on."""

    def __init__(
        self,
        model: TrueModel,
        *,
        engine: EngineName = "llama-server",
        persistent: bool = False,
        sandbox: SandboxName = "process",
        target: Target = "host",
        version: str = "b10434",
        limits: BatchLimits = (),
        capacity: int | None = None,
    ) -> None:
        self.model, self.target, self.version, self.limits, self.capacity = model, target, version, limits, capacity
        self.engine_name, self.persistent, self.sandbox_name = engine, persistent, sandbox
        self.events: list[str] = []
        self.plots: dict[str, Callable[[], object]] = {}
        self.running: FakeRunning | None = None
        self.loaded: LoadRequest | None = None
        self.log: Path | None = None
        #: The file of the engine's program.
        self.program: Path | None = None
        #: Changes of the text of a load's log, by its context.
        self.log_edits: dict[int, Callable[[str], str]] = {}
        self.pool = 0
        self.blind: str | None = None
        self.others: dict[int, int] = {}
        self.extra: dict[int, int] = {}
        self.left = 0
        self.basis: Literal["process", "device-delta"] = "process"
        self.embedding = False
        self.digest = f"sha256:{'a' * 64}"
        self.layer_kinds: str | None = None
        self.dry_runs_end: DryRunEnd = "printed"

    def happen(self, event: str) -> None:
        """Note an event, and do what a test has planned for it."""
        self.events.append(event)
        if (plot := self.plots.get(event)) is not None:
            plot()

    # -- what a load takes ------------------------------------------------------------------------------------------

    def memory(self) -> int:
        """Bytes that the processes of the engine hold."""
        request = self.loaded
        if request is None or request.purpose not in ("point", "speed"):
            return 0
        growing = POOL - self.pool if self.target == "gpu" else 0
        return self.takes(request) - growing + self.extra.get(request.context, 0)

    def takes(self, request: LoadRequest) -> int:
        """Bytes of a load after a prompt."""
        return self.model.truth(request.context, request.num_batch or 512)

    def load_model(self, request: LoadRequest) -> None:
        """Hold a model, or say in the log that there is no room for it, and end."""
        self.happen(f"load {request.context}" if request.purpose == "point" else f"load {request.context} {request.purpose}")
        if self.running is None or self.running.status is not None:
            return
        if request.purpose == "dry-run":
            self.write(breakdown(self.model, request, self.layer_kinds or ""))
            return
        if self.capacity is not None and self.takes(request) > self.capacity:
            self.write("ggml_backend_alloc: failed to allocate buffer: out of memory\n")
            self.end(1)
            return
        self.loaded, self.pool = request, 0
        text = log_of(self.model, request, self.target)
        edit = self.log_edits.get(request.context)
        self.write(text if edit is None else edit(text))

    def write(self, text: str) -> None:
        """Add to the engine's log."""
        assert self.log is not None
        with self.log.open("a") as file:
            file.write(text)

    def end(self, status: int) -> None:
        """The engine ends by itself."""
        assert self.running is not None
        self.running.status = status
        self.loaded = None


def log_of(model: TrueModel, request: LoadRequest, target: Target) -> str:
    """What llama.cpp b10434 prints of a load, with every figure that is read."""
    context, batch = request.context, request.num_batch or 512
    device, layers = ("CUDA0", LAYERS + 1) if target == "gpu" and request.purpose != "host-speed" else ("CPU", 0)
    cells, flash = pad_cells(context), "enabled" if model.flash_attention else "disabled"
    cache = sum(model.caches(context, batch)) / MIB
    return "\n".join(
        (
            "llama_model_loader: loaded meta data with 33 key-value pairs and 236 tensors from /models/made-up.gguf "
            "(version GGUF V3 (latest))",
            "load_tensors: loading model tensors, this can take a while... (load_mode = mmap)",
            f"load_tensors: offloaded {layers}/{LAYERS + 1} layers to GPU",
            f"load_tensors: {device:>12} model buffer size = {model.weights / MIB:8.2f} MiB",
            "llama_context: constructing llama_context",
            "llama_context: n_seq_max             = 1",
            f"llama_context: n_ctx                 = {cells}",
            f"llama_context: n_ubatch              = {min(batch, cells)}",
            f"llama_context: flash_attn            = {flash}",
            f"llama_kv_cache: {device:>10} KV buffer size = {cache:8.2f} MiB",
            f"llama_kv_cache: size = {cache:8.2f} MiB ({cells:6d} cells, {LAYERS} layers,  1/1 seqs), "
            f"K (f16): {cache / 2:8.2f} MiB, V (f16): {cache / 2:8.2f} MiB",
            f"sched_reserve: Flash Attention was auto, set to {flash}",
            f"sched_reserve: {device:>10} compute buffer size = {model.compute(context, batch) / MIB:8.2f} MiB",
            "srv  llama_server: model loaded",
            "",
        )
    )


def breakdown(model: TrueModel, request: LoadRequest, kinds: str) -> str:
    """What its dry run prints for a number of layers on the GPU, in whole MiB, and of the kind of each layer."""
    share = (request.gpu_layers or 0) / (LAYERS + 1)
    cache, compute = sum(model.caches(request.context, 512)), model.compute(request.context, 512)
    parts = [int(size / MIB) for size in (share * model.weights, share * cache, compute)]
    row = "common_memory_breakdown_print: |"
    what = {"f": "llama_kv_cache", "r": "llama_memory_recurrent"}
    layers = "".join(f"{what[kind]}: layer {index:3d}: dev = CUDA0\n" for index, kind in enumerate(kinds))
    return (
        "srv    load_model: loading model '/models/made-up.gguf'\n"
        f"{layers}"
        f"{row} memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |\n"
        f"{row}   - CUDA0 (Test A) | 24576 = 24000 + ( {sum(parts)} = {parts[0]} + {parts[1]} + {parts[2]}) + -100 |\n"
        "common_fit_params: successfully fit params to free device memory\n"
    )


class FakeRunning:
    """An engine that runs in a :class:`World`."""

    def __init__(self, world: World, log: Path) -> None:
        self.world, self.log = world, log
        self.status: int | None = None
        self.endpoint = "http://127.0.0.1:9"  # nothing listens there, and nothing is sent

    @property
    def image(self) -> ImageFacts | None:
        return ImageFacts(reference="fake:1", digest=f"sha256:{'f0' * 32}") if self.world.sandbox_name == "docker" else None

    def pids(self) -> frozenset[int]:
        if self.status is not None:
            return frozenset()
        if not self.world.persistent:
            return frozenset({SERVER})
        return frozenset({SERVER, HOLDER} if self.world.loaded else {SERVER})

    def end_network(self) -> None:
        """It has none."""

    def exit_status(self) -> int | None:
        return self.status

    def stop(self, timeout: float = 10.0) -> None:
        if self.status is None:
            self.world.happen("stop")
            self.status = 0
        self.world.loaded = None


class FakeSandbox:
    """Starts engines in a :class:`World`."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def name(self) -> SandboxName:
        return self.world.sandbox_name

    def site(self, port: int | None = None) -> Site:
        return Site(sandbox=self.name, host="127.0.0.1", port=port or 9)

    def start(self, launch: Launch, site: Site, log: Path) -> FakeRunning:
        world = self.world
        assert world.running is None or world.running.status is not None, "one engine at a time"
        world.running, world.log = FakeRunning(world, log), log
        log.touch()
        world.happen("start")
        if launch.argv[0] == "load":
            world.load_model(msgspec.json.decode(launch.argv[1], type=LoadRequest))
        return world.running

    def close(self) -> None:
        self.world.happen("close sandbox")
        if self.world.running is not None and self.world.running.status is None:
            self.world.end(143)


class FakePolicy(Policy):
    """The decisions of the engine whose name it has, but for its batches, which are a test's."""

    def __init__(self, world: World) -> None:
        self.world, self.real = world, policy_of(world.engine_name)

    def __getattribute__(self, name: str) -> Any:
        own = ("world", "real", "batch_limits", "reserve_bytes")
        return object.__getattribute__(self, name) if name in own else getattr(self.real, name)

    def batch_limits(self, version: str | None, *, target: str = "gpu", flash_attention: str = "auto") -> BatchLimits:
        return self.world.limits

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        return 1024 * MIB


class FakeEngine(Engine):
    """A recipe: with each load a start, or with one start for all of them."""

    sandboxes: tuple[SandboxName, ...] = ("process", "docker")

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def name(self) -> EngineName:
        return self.world.engine_name

    @property
    def policy(self) -> Policy:
        return FakePolicy(self.world)

    @property
    def persistent(self) -> bool:
        return self.world.persistent

    def installed(self, options: Options) -> tuple[Path, ...]:
        return (self.world.program,) if self.world.program is not None else ()

    def leaves_alone(self, integrated: bool, gfx: int | None, env: dict[str, str]) -> bool:
        return False

    def resolve(self, name: str, options: Options) -> Source:
        weights = self.world.model.weights
        return Source(
            model=Model(name=name, digest=self.world.digest, train_context=self.world.model.train_context, layers=LAYERS),
            tensors=Tensors(layer_bytes=(weights // (LAYERS + 1),) * LAYERS, output_bytes=0, embedding_bytes=0),
            own_name=name,
            embedding=self.world.embedding,
        )

    def version(self, options: Options, client: httpx.Client | None) -> EngineVersion:
        known = self.world.running is not None or self.world.sandbox_name == "process"
        return EngineVersion(version=self.world.version if known else None)

    def launch(self, source: Source, request: LoadRequest | None, options: Options, site: Site) -> Launch:
        if self.persistent or request is None:
            return Launch(argv=("serve",))
        return Launch(argv=("load", msgspec.json.encode(request).decode()))

    def ends_dry_runs(self, options: Options) -> DryRunEnd:
        return self.world.dry_runs_end

    def ready(self, client: httpx.Client) -> bool:
        self.world.happen("poll")
        return self.world.running is not None and self.world.running.status is None

    def prepare(self, client: httpx.Client, source: Source, options: Options, progress: Progress) -> Source:
        self.world.happen("prepare")
        return source

    def load(self, client: httpx.Client, source: Source, request: LoadRequest, options: Options) -> Reported | None:
        if self.persistent:
            self.world.load_model(request)
            if self.world.loaded is None:
                raise EngineError("the server did not answer", code="no-answer")
        return None

    def generate(
        self, client: httpx.Client, source: Source, request: LoadRequest, options: Options, prompt: int, tokens: int
    ) -> Speed:
        self.world.happen(f"read {prompt}")
        self.world.pool = POOL
        rate = 60.0 if request.purpose == "speed" else 6.0
        return Speed(prompt_tokens=prompt, prompt_tokens_per_s=900.0, decode_tokens=tokens, decode_tokens_per_s=rate)

    def unload(self, client: httpx.Client, source: Source, options: Options) -> None:
        self.world.loaded = None
        self.world.happen("unload")


class FakeMeter:
    """Reads a :class:`World`, as the host's meter does."""

    name: MeterName = "host"
    interval = 0.001

    def __init__(self, world: World) -> None:
        self.world = world

    def read(self, pids: frozenset[int]) -> Reading:
        world = self.world
        if world.blind is not None:
            return Reading(total_bytes=None, reason=world.blind)
        holder = HOLDER if world.persistent else SERVER
        held = world.memory() if holder in pids else 0
        return Reading(total_bytes=held, other_processes=dict(world.others), basis=world.basis)

    def close(self) -> None:
        self.world.happen("close meter")


class FakeGpuMeter(FakeMeter):
    """The same for one GPU, which it also sees as a whole."""

    name: MeterName = "nvml"
    peek_interval = 0.001

    def take_baseline(self) -> Occupancy:
        self.world.happen("baseline")
        return self.occupancy()

    def occupancy(self) -> Occupancy:
        return Occupancy(devices={DEVICE: self.world.left}, processes=dict(self.world.others))

    def risen(self) -> dict[str, int]:
        return {DEVICE: self.world.memory() + self.world.left}

    def peek(self) -> int | None:
        return sum(self.risen().values())

    def accounted(self, pids: frozenset[int]) -> int | None:
        return None


class Heard(Observer):
    """Keeps what a workflow says."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.warnings: list[str] = []

    def phase(self, title: str, step: int, steps: int) -> None:
        self.steps.append((step, steps))
        self.phases.append(title)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def open_doors(world: World, patch: pytest.MonkeyPatch) -> None:
    """Let harness find the world's engine, sandbox and meter where it looks for real ones.

    No limit of a wait is shorter than on a real machine: a test in which one passes sets it.
    """
    gpus = (Gpu(name="Test A", uuid=DEVICE, memory_gb=24.0),) if world.target == "gpu" else ()
    meter = FakeGpuMeter(world) if world.target == "gpu" else FakeMeter(world)
    choice = Backend(
        engine=world.engine_name, sandbox=world.sandbox_name, meter=meter.name, target=world.target, gpus=gpus, reasons=()
    )
    session = "harness.measure.prepare"

    @contextlib.contextmanager
    def opened(*_: object) -> Iterator[tuple[FakeSandbox, FakeMeter]]:
        with contextlib.closing(FakeSandbox(world)) as sandbox, contextlib.closing(meter):
            yield sandbox, meter

    patch.setattr(f"{session}.recipe_of", lambda *_: FakeEngine(world))
    patch.setattr(f"{session}.resolve_name", lambda name, *_: (name, ()))
    patch.setattr(f"{session}.choose", lambda *_: choice)
    patch.setattr("harness.measure.calibrate.opened", opened)
    patch.setattr("harness.measure.calibrate.lock_names", lambda *_: ())
    patch.setattr("harness.measure.engine_log.DEVICES_LINE", 0.0)

    patch.setattr("harness.measure.kills.oom_kills", lambda *_: 0)  # what else this machine does
    patch.setattr("os.fsync", lambda _: None)
    patch.setattr("httpx.Client", lambda **_: contextlib.nullcontext())

    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a fast test starts no process")

    for starter in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        patch.setattr(starter, no_process)


def calibrate(world: World, patch: pytest.MonkeyPatch, folder: Path, heard: Heard | None = None, **options: Any) -> Result:
    """``harness.calibrate`` in a world, into a store below ``folder``; three loads of 1 024 to 4 096 tokens."""
    open_doors(world, patch)
    options = {"contexts": (1024, 2048, 4096), "speed": False, "engine": world.engine_name, **options}
    return harness.calibrate("made-up", store=folder, observer=heard or Heard(), **options)


def only_record(folder: Path) -> Any:
    """The :class:`Record` of the only run of a store; what may be missing in it is there, or the test fails."""
    (run,) = (folder / "runs").iterdir()
    return read_record(run / "record.json")
