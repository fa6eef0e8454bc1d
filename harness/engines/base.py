"""The seam between the calibration workflow and an engine: a recipe, not a process.

A recipe says what to launch, which requests load, time and unload a model, and how the engine places layers and chooses
batches. It never starts anything itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

from harness.engines.gguf import Header
from harness.errors import NotFoundError, NotPermittedError, UnavailableError
from harness.model.facts import EngineName
from harness.model.finding import Finding
from harness.model.gpu import LocalGpu
from harness.model.record import (
    EngineVersion,
    Estimate,
    HeaderSource,
    LoadRequest,
    Model,
    Reported,
    Speed,
    Target,
    Tensors,
    Weights,
)
from harness.options import CalibrationOptions
from harness.sandboxes.base import GpuRequest, Launch, SandboxName, Site

if TYPE_CHECKING:
    import httpx

    from harness.engines.policy import Policy

#: Reports progress of a long step: what, done, total (``None``: not known).
Progress = Callable[[str, float, float | None], None]
#: Code of the EngineError of a request that got no answer; the engine's end, if it ended, says more.
NO_ANSWER: Final = "no-answer"
#: When a dry run is over: the server has printed what was asked; it answers, or has ended.
DryRunEnd = Literal["printed", "ready"]
_NO_MEMORY: Final = (
    "out of memory",
    "out-of-memory",
    "unable to allocate",
    "failed to allocate",
    "failed to create context",
    "std::bad_alloc",
    "ErrorOutOfDeviceMemory",
    "failed to allocate buffer",
    "requires more system memory",
    "requires more gpu memory",
    "memory layout cannot be allocated",
)
#: Codes of the EngineError of an engine, or its runner, that was killed (SIGKILL), and of one that is known to have been
#: killed for its memory.
KILLED: Final = "engine-killed"
OUT_OF_MEMORY: Final = "out-of-memory"


def answers_ok(client: httpx.Client, path: str) -> bool:
    """Whether ``GET path`` answers 200 within two seconds; no connection, or none yet, is a no."""
    import httpx

    try:
        return client.get(path, timeout=2.0).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def asked_program(binary: str) -> Path:
    """The program that the user named, by its whole path: an engine runs in a folder of its own.

    Raises:
        NotFoundError: it does not exist. NotPermittedError: it is not executable.
    """
    path = Path(shutil.which(binary) or binary).expanduser().absolute()
    if not path.exists():
        raise NotFoundError(f"no such engine binary: {binary}", code="no-engine-binary")
    if path.is_dir() or not os.access(path, os.X_OK):
        raise NotPermittedError(f"{path} is not executable", code="not-executable")
    return path


def could_not_allocate(text: str) -> bool:
    """Whether an engine's words say that a load did not fit."""
    return any(sign in text for sign in _NO_MEMORY)


def was_killed(text: str) -> bool:
    """Whether an engine's words say that a process of it was killed (Go's ``os.ProcessState``), which says no reason."""
    return "signal: killed" in text


class Options(CalibrationOptions, frozen=True, kw_only=True):
    """The options that every load of a run shares; ``target`` and ``memory_limit`` (bytes) follow from the machine.

    ``named``: the user named the program, or an image that is not the pinned one.
    """

    gpus: GpuRequest = GpuRequest()  # type: ignore[assignment]
    target: Target = "gpu"
    memory_limit: int | None = None
    named: bool = False


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a document is, and what its server is sent beside the request."""

    url: str
    headers: dict[str, str] = {}


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """What the index of an engine's registry names: weights, a projector, or a small document; ``size`` in bytes."""

    kind: str
    digest: str
    size: int
    url: str


class RemoteRegistry(Protocol):
    """A registry of an engine's models, as addresses: nothing is fetched here."""

    def manifest(self, name: str) -> Address:
        """Where the index of a model is.

        Raises:
            NotFoundError: the engine could not know such a name.
        """

    def layers(self, name: str, text: bytes) -> tuple[Layer, ...]:
        """What that index names.

        Raises:
            BadInputError: it is none.
        """


class HeaderOnly(msgspec.Struct, frozen=True, kw_only=True):
    """A model of which the header is here: its parts and projector as sparse files, and the documents of its registry.

    ``digest`` is the model's own, ``None`` where its source does not say it. ``folder`` is a scratch folder for the engine.
    """

    name: str
    source: str
    folder: Path
    parts: tuple[Path, ...]
    model: Model
    tensors: Tensors
    header: Header
    estimate: Estimate | None = None
    projector: Path | None = None
    revision: str | None = None
    manifest: bytes | None = None
    own_name: str = ""
    documents: dict[str, Path] = {}
    projector_digest: str | None = None

    @property
    def digest(self) -> str | None:
        """The model's own."""
        return self.model.digest


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model's weights come from: a local GGUF, or a name that the engine itself resolves.

    ``own_name`` is what the engine calls the model; ``projector_bytes`` the weights of an image projector beside it. An
    ``embedding`` model reads a prompt in one batch and writes nothing. Of ``weights`` only the header may be here.
    ``plan_path`` is a file with its header, from which loads can be planned. ``lent``
    is a folder of the user's that has the model already, which a container is shown and may not write to.
    """

    weights: Weights = "full"
    header: HeaderSource | None = None
    plan_path: Path | None = None

    model: Model
    path: Path | None = None
    tensors: Tensors | None = None
    estimate: Estimate | None = None
    own_name: str = ""
    projector_bytes: int = 0
    embedding: bool = False
    lent: Path | None = None


class Engine(Protocol):
    """A recipe for one engine. A class of it inherits what most engines do; what has no default is said by each."""

    @property
    def name(self) -> EngineName:
        """The engine's name in ids and options."""

    @property
    def policy(self) -> Policy:
        """What the engine decides."""

    @property
    def persistent(self) -> bool:
        """Whether one start serves many loads (Ollama), or every load is a start (llama-server, vLLM)."""

    @property
    def sandboxes(self) -> tuple[SandboxName, ...]:
        """Sandboxes that it can run in, the preferred one first."""

    def installed(self, options: Options) -> tuple[Path, ...]:
        """The files of the program that a process would run, its own first; empty where there is none, or it is not known.

        Raises:
            NotFoundError, NotPermittedError: of a program that was asked for. BadInputError: it is of another engine.
        """
        return ()

    def leaves_alone(self, integrated: bool, gfx: int | None, env: dict[str, str]) -> bool:
        """Whether it does not use such a GPU of AMD's or Intel's of its own accord; ``gfx`` is ROCm's number of an AMD GPU."""
        return True

    def resolve(self, name: str, options: Options) -> Source:
        """Find a model without starting anything, in well under two seconds.

        Raises:
            NotFoundError: the engine cannot reach such a model.
            BadInputError: the file is not a model.
        """

    def planning(self, path: Path, request: LoadRequest, options: Options) -> Launch | None:
        """A program that says what a load on the host would allocate, and allocates nothing; ``None``: it has none.

        It ends by itself, in seconds, whatever its status; its log is read by :func:`harness.logs.planned.read_plan`.
        """
        return None

    def from_header(self, header: HeaderOnly, options: Options) -> tuple[Source, Options]:
        """A source that loads without weights, and the options with which it is found.

        Raises:
            UnavailableError: the engine cannot do without them.
        """
        raise UnavailableError(f"{self.name} cannot measure a model from its header", code="no-header-only")

    def version(self, options: Options, client: httpx.Client | None) -> EngineVersion:
        """The engine's version, from its binary (``client`` is ``None``) or from the running server (in a container)."""

    def launch(self, source: Source, request: LoadRequest | None, options: Options, site: Site) -> Launch:
        """What to start for a load (``None``: for a persistent engine, before the loads that measure memory)."""

    def ends_dry_runs(self, options: Options) -> DryRunEnd:
        """When a dry run may be ended."""
        return "printed"

    def ready(self, client: httpx.Client) -> bool:
        """Whether the server answers now; never blocks for long and never raises for "not yet"."""

    def prepare(self, client: httpx.Client, source: Source, options: Options, progress: Progress) -> Source:
        """Make the model present in a running persistent engine (pull, create), and learn the rest about it."""
        return source

    def load(self, client: httpx.Client, source: Source, request: LoadRequest, options: Options) -> Reported | None:
        """Load the model at a setting, unless it was loaded at start; what the engine itself says of its memory then.

        Raises:
            WontFitError: it did not fit. BusyError: it took too long. EngineError: anything else.
        """
        return None

    def generate(
        self, client: httpx.Client, source: Source, request: LoadRequest, options: Options, prompt: int, tokens: int
    ) -> Speed:
        """Read a prompt of about ``prompt`` tokens and write ``tokens``; the engine's own timings."""

    def unload(self, client: httpx.Client, source: Source, options: Options) -> None:
        """Ask a persistent engine to drop the model; returns when it has. Of others it ends with the process."""
        return

    def devices(self, options: Options) -> tuple[LocalGpu, ...] | None:
        """GPUs as its program lists them, by its own names; ``None``: it lists none, the driver is asked.

        Raises:
            EngineError: it does not start.
        """
        return None

    def weights_digest(self, own_name: str, options: Options, volume: Callable[[str], str | None]) -> str | None:
        """The digest of the weights that it would load under a name of its own; ``None`` where that is not known.

        ``volume`` gives the folder behind a Docker volume, where it may be read.
        """
        return None

    def findings(self, gpus: Sequence[LocalGpu]) -> Iterable[Finding]:
        """What ``harness doctor`` says of the engine on this machine; ``gpus`` are its NVIDIA GPUs."""
        return ()
