"""What this machine has now: GPUs and their free memory, host memory, the engine's version, models that run already.

Each thing is read once, when it is first asked for: ``harness check`` runs before every start of a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from harness.engines.policy import LLAMA_MEMORY
from harness.engines.registry import BUILT_IN, EMBEDDED, policy_of, recipe_of, running_servers, version_here
from harness.errors import ADVICE, HarnessError, UnavailableError, UsageError
from harness.model.calibration import Calibration
from harness.model.facts import EngineName
from harness.model.gpu import LocalGpu
from harness.model.trace import MeterName
from harness.prediction.rules import LoadedModel
from harness.prediction.settings import AskedSettings
from harness.text import counted

if TYPE_CHECKING:
    from harness.engines.running import RunningServer


class ModelProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that runs a model now, as its command line says: ``names`` of it; tokens per slot, ``None``: unsaid.

    ``settings`` are those that its command line or its variables name, ``placed`` options that put weights or cache elsewhere
    than the engine would, ``gpu_layers`` how many it puts on the GPU.
    """

    pid: int
    engine: EngineName
    names: frozenset[str] = frozenset()
    context: int | None = None
    num_parallel: int = 1
    settings: AskedSettings = AskedSettings()
    placed: bool = False
    gpu_layers: int | None = None


class LocalMachine:
    """This machine. ``gpu`` (an index, a UUID, or an engine's device name, or several) leaves that GPU alone in view.

    ``start_env``: the variables of an engine that is about to be started, which nothing that runs here has a say in.
    """

    def __init__(self, gpu: str | None = None, start_env: Mapping[str, str] | None = None) -> None:
        self.gpu, self.start_env = gpu, start_env
        self._running: dict[EngineName, tuple[RunningServer, ...]] = {}
        self._versions: dict[tuple[EngineName, str], str | None] = {}
        self._listed: dict[tuple[tuple[str, str], ...], tuple[LocalGpu, ...] | HarnessError] = {}

    @property
    def names_gpu(self) -> bool:
        """Whether GPUs were chosen; ``none`` leaves host memory."""
        return self.gpu not in (None, "none")

    def gpus_of(self, meter: MeterName, env: dict[str, str]) -> tuple[LocalGpu, ...] | HarnessError:
        """The GPUs that a meter would read, or why there are none; ``env`` is what an engine that lists them is given."""
        if meter == "drm":
            return self.kernel_gpus(env)
        return self.engine_gpus(env) if meter == "log" else self.nvidia

    @cached_property
    def nvidia(self) -> tuple[LocalGpu, ...] | HarnessError:
        """NVIDIA GPUs as the driver has them (one initialisation of NVML), or why it cannot be asked."""
        from harness.meters.nvml import gpus

        try:
            return self._in_view(tuple(gpus()))
        except HarnessError as error:
            return error

    def kernel_gpus(self, env: dict[str, str]) -> tuple[LocalGpu, ...] | HarnessError:
        """GPUs of AMD and Intel as the kernel has them; what it does not say is taken from llama-server's list."""
        from harness.meters.drm_devices import drm_gpus, matching

        kernel = drm_gpus()
        free = {gpu.key: gpu.free_bytes for gpu in kernel}
        if any(gpu.free_bytes is None and not gpu.asleep for gpu in kernel):
            listed = self.engine_gpus(env)
            for one in () if isinstance(listed, HarnessError) else listed:
                for gpu in matching([one], kernel):
                    free[gpu.key] = one.free_bytes if free[gpu.key] is None else free[gpu.key]
        return self._in_view(tuple(msgspec.structs.replace(gpu, free_bytes=free[gpu.key]) for gpu in kernel))

    def engine_gpus(self, env: dict[str, str]) -> tuple[LocalGpu, ...] | HarnessError:
        """GPUs without a driver meter, as llama-server lists them: its free memory is what its placement goes by."""
        key = tuple(sorted(env.items()))
        if key not in self._listed:
            self._listed[key] = self._list(env)
        return self._listed[key]

    def _list(self, env: dict[str, str]) -> tuple[LocalGpu, ...] | HarnessError:
        from harness.engines.base import Options

        options = Options(env=env, engine_binary=os.environ.get("HARNESS_ENGINE_BINARY") or None)
        try:
            return self._in_view(recipe_of(EMBEDDED).devices(options) or ())
        except HarnessError as error:
            return error

    def _in_view(self, found: tuple[LocalGpu, ...]) -> tuple[LocalGpu, ...] | HarnessError:
        if not found:
            return UnavailableError("no GPU found", hint=ADVICE, code="no-gpu")
        if self.gpu is None:
            return found
        if self.gpu == "none":
            return UnavailableError(
                "no GPU is to be used", hint="HARNESS_GPUS, or gpus of harness.toml, is none", code="no-gpu"
            )
        wanted = {part.strip() for part in self.gpu.split(",")}
        chosen = tuple(one for one in found if wanted & {one.key, one.uuid})
        if len(chosen) == len(wanted):
            return chosen
        there = ", ".join(f"{one.key} ({one.name})" for one in found)
        return UnavailableError(f"there is no GPU {self.gpu}; there are: {there}", code="no-such-gpu")

    def check_sizes(self, available: Sequence[int] | None) -> None:
        """Refuse memory of another number of devices than the GPUs that were asked for.

        Raises:
            UsageError: more sizes, or fewer.
        """
        named = len((self.gpu or "").split(",")) if self.names_gpu else 0
        if named and available and len(available) != named:
            raise UsageError(
                f"--gpu {self.gpu} is {'one GPU' if named == 1 else f'{named} GPUs'}, and --available has "
                f"{counted(len(available), 'size')}",
                hint="one size for each GPU, or no --gpu",
            )

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables with which an engine that is started from here begins."""
        return dict(os.environ)

    @cached_property
    def host_bytes(self) -> int | None:
        """Host memory that is available: ``MemAvailable``, or less where a cgroup has a limit."""
        from harness.meters.host import available_memory

        return available_memory()

    def running(self, engine: EngineName) -> tuple[RunningServer, ...]:
        """Servers of an engine that run now and answer, asked once."""
        if engine not in self._running:
            self._running[engine] = running_servers(engine)
        return self._running[engine]

    def loaded(self, engine: EngineName, gpus: Sequence[LocalGpu], names: Sequence[str]) -> tuple[LoadedModel, ...]:
        """What servers of an engine hold of these GPUs by their own account, the first to go first; ``names`` are the GPUs'.

        A server says how much a model takes of all GPUs together: on several it is shared out by what is in use on each.
        """
        used = [max((gpu.total_bytes or 0) - (gpu.free_bytes or 0), 0) for gpu in gpus]
        found = [model for server in self.running(engine) for model in server.models if model.gpu_bytes]
        return tuple(
            LoadedModel(
                name=model.name,
                on_devices={
                    name: min((model.gpu_bytes or 0) * size // max(sum(used), 1), size)
                    for name, size in zip(names, used, strict=True)
                },
            )
            for model in found
        )

    def engine_version(self, calibration: Calibration) -> str | None:
        """The version that would run now, where that is known without starting anything."""
        if servers := self.running(calibration.engine):
            return servers[0].version
        where = calibration.engine, calibration.metadata.machine.sandbox
        if where not in self._versions:
            self._versions[where] = version_here(*where)
        return self._versions[where]


def residents(calibration: Calibration, proc: Path = Path("/proc")) -> tuple[ModelProcess, ...]:
    """Processes that have this model loaded, found by the weights or the name on their command line."""
    wanted = process_names(calibration)
    found = [one for one in model_processes(proc, calibration.engine) if one.names & wanted]
    return tuple(sorted(found, key=lambda one: one.pid))


def process_names(calibration: Calibration) -> frozenset[str]:
    """Names under which a process may have a calibrated model: its own, of its file, of its weights in an engine's store."""
    model = calibration.metadata.model
    digests = (digest.replace(":", "-") for digest in (model.digest, model.stored_digest) if digest is not None)
    return frozenset({model.name, Path(model.name).stem if model.name.endswith(".gguf") else model.name, *digests})


def model_processes(proc: Path = Path("/proc"), *more: EngineName) -> Iterator[ModelProcess]:
    """Processes that have a model, of harness's own engines and ``more``: one walk through ``/proc``."""
    policies = [policy_of(name) for name in dict.fromkeys((*BUILT_IN, *more))]
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            policy = next((one for one in policies if one.runs(words)), None)
            variables = _environment(folder) if policy is not None else {}
            if policy is None or not (names := _loaded(words, variables, policy.name_variables)):
                continue
        except OSError:
            continue  # it ended, or is another user's
        # What an option says comes before the variable that stands for it.
        said = variables | {_VARIABLES[flag]: value for flag, value in pairwise(words) if flag in _VARIABLES}
        by_words, by_variables = policy_of(EMBEDDED).settings_by(said), policy.settings_by(variables)
        named = {field: getattr(by_words, field) or getattr(by_variables, field) for field in AskedSettings.__struct_fields__}
        slots, total = _number(said.get("LLAMA_ARG_N_PARALLEL")) or 1, _number(said.get("LLAMA_ARG_CTX_SIZE"))
        length = next((value for flag, value in pairwise(words) if flag == "--max-model-len"), None)
        layers = said.get("LLAMA_ARG_N_GPU_LAYERS", "")
        yield ModelProcess(
            pid=int(folder.name),
            engine=policy.name,
            names=frozenset(names),
            context=_number(length) or (None if total is None else total // slots),
            num_parallel=slots,
            settings=AskedSettings(**named),
            placed=not _PLACING.isdisjoint(words) or any(variables.get(name) for name in _PLACING_VARIABLES),
            gpu_layers=int(layers) if layers.isdecimal() else None,
        )


#: Options of llama.cpp's server and the variables that stand for them (common/arg.cpp).
_VARIABLES: Final = {
    **dict.fromkeys(("-c", "--ctx-size"), "LLAMA_ARG_CTX_SIZE"),
    **dict.fromkeys(("-np", "--parallel"), "LLAMA_ARG_N_PARALLEL"),
    **dict.fromkeys(("-ctk", "--cache-type-k"), "LLAMA_ARG_CACHE_TYPE_K"),
    **dict.fromkeys(("-ctv", "--cache-type-v"), "LLAMA_ARG_CACHE_TYPE_V"),
    **dict.fromkeys(("-fa", "--flash-attn"), "LLAMA_ARG_FLASH_ATTN"),
    **dict.fromkeys(("-ub", "--ubatch-size"), "LLAMA_ARG_UBATCH"),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), "LLAMA_ARG_N_GPU_LAYERS"),
}
_PLACING: Final = frozenset((
    *("-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-nkvo", "--no-kv-offload", "--swa-full"),
    *("-sm", "--split-mode"),
))  # fmt: skip
_PLACING_VARIABLES: Final = (*LLAMA_MEMORY, "LLAMA_ARG_N_CPU_MOE")


def _number(text: str | None) -> int | None:
    return int(text) or None if text and text.isdecimal() and len(text) < 12 else None


def _environment(folder: Path) -> dict[str, str]:
    """The variables of a process; none of another user's, whose cannot be read."""
    with suppress(OSError):
        entries = (folder / "environ").read_bytes().decode("utf-8", "replace").split("\0")
        return {name: value for name, sign, value in (entry.partition("=") for entry in entries) if sign}
    return {}


def _loaded(words: list[str], environment: Mapping[str, str], variables: tuple[str, ...]) -> set[str]:
    """Names under which a process has its model: of the file that it was started with, and of its alias."""
    names = set()
    for flag, value in pairwise(words):
        if flag in ("--model", "-m", "--alias", "-a", "serve"):
            names |= {value, Path(value).name, Path(value).stem}
    return names | {environment[name] for name in variables if name in environment}
