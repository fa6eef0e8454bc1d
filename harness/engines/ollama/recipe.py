"""Ollama: one server that loads models when a request wants them.

Facts: envconfig/config.go, server/sched.go and llm/llama_server.go of ollama/ollama, 0.12 to 0.33. From 0.30 on it starts
llama.cpp's server for every GGUF; before, a runner of its own.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from harness.engines import gguf
from harness.engines.base import Engine, HeaderOnly, Options, Progress, Source, answers_ok
from harness.engines.ollama import native
from harness.engines.ollama.api import connected
from harness.engines.ollama.models import check_digest, described, present
from harness.engines.ollama.names import manifest, models_folder, split_name, stored_digest
from harness.engines.ollama.policy import OllamaPolicy, is_on
from harness.errors import EngineError, NotFoundError, UnavailableError, UsageError
from harness.fit.load_plan import DEFAULT_BATCH
from harness.model.finding import Finding
from harness.model.gpu import LocalGpu
from harness.model.record import EngineVersion, LoadRequest, Model, Reported, Speed
from harness.polling import poll
from harness.sandboxes.base import Launch, Mount, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import httpx
    from ollama import Client

#: The volume that keeps pulled models; its layout is that of ``~/.ollama``, so Ollama itself can use it too.
VOLUME: Final = "harness-ollama"
_HOME: Final = "/root/.ollama"
#: Where models of the user's are mounted.
_MODELS: Final = "/ollama"
#: How long an unload may take, seconds.
_UNLOAD: Final = 60.0
#: Fewer tokens written than this tell no speed: the model ended its answer.
_TIMED_TOKENS: Final = 8
#: A host engine that is repeatable: malloc itself touches what it reserves, nothing is repacked or cached, and the heap of
#: a runner in Go stays near what it holds (at the default its garbage grew by 74 MiB from 4 096 to 16 384 tokens, 0.20.2).
_HOST_ENV: Final = {
    "MALLOC_PERTURB_": "85",
    "GOGC": "1",
    "LLAMA_ARG_FIT": "off",  # its dry run leaves 4 to 7 MiB behind, and there is no device to fit to
    "LLAMA_ARG_REPACK": "0",
    "LLAMA_ARG_CTX_CHECKPOINTS": "0",
    "LLAMA_ARG_CACHE_RAM": "0",
}
#: ``gfx_target_version`` of the one integrated AMD GPU that it uses unasked.
_STRIX_HALO: Final = 110501
#: Words that most tokenizers know as one token each.
_WORDS: Final = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother", "area",
    "money",
)  # fmt: skip


class Ollama(Engine):
    """Recipe of Ollama."""

    policy: Final = OllamaPolicy()
    name: Final = policy.name
    persistent: Final = True
    sandboxes: Final = ("docker", "process")

    def __init__(self) -> None:
        self._prompts = itertools.count()

    def installed(self, options: Options) -> tuple[Path, ...]:
        """The user's ``ollama`` and the runner that it starts."""
        program = native.find_program(options.engine_binary)
        return () if program is None else native.program_files(program)

    def leaves_alone(self, integrated: bool, gfx: int | None, env: dict[str, str]) -> bool:
        """Integrated ones but gfx1151 (Strix Halo), unless ``OLLAMA_IGPU_ENABLE`` is set (discover/gpu.go, 0.30)."""
        return integrated and gfx != _STRIX_HALO and not is_on(env, "OLLAMA_IGPU_ENABLE")

    def weights_digest(self, own_name: str, options: Options, volume: Callable[[str], str | None]) -> str | None:
        """From the manifest in the store that would be used: the user's, or the one behind the volume."""
        if options.sandbox == "process":
            folder: Path | None = native.find_store(own_name, options, os.environ)
        else:
            named = options.models is not None
            folder = models_folder(options.models or "") if named else native.lendable(own_name, os.environ)
            if folder is None:
                mounted = volume(options.models or VOLUME)
                folder = None if mounted is None else Path(mounted) / "models"
        return None if folder is None else stored_digest(folder, own_name)

    def findings(self, gpus: Sequence[LocalGpu]) -> Iterable[Finding]:
        """What it would run without Docker, and what runs already."""
        from harness.engines.ollama.findings import ollama_findings

        return ollama_findings(self, gpus)

    def resolve(self, name: str, options: Options) -> Source:
        """A GGUF file by its path, or a name of Ollama's, which a registry or the user's models folder has."""
        keys, both, _ = (options.kv_cache_type or "").partition("/")
        if both:  # it would warn in its log, and take f16
            raise UsageError(
                f"Ollama has one type for the keys and the values of its cache, not {options.kv_cache_type}",
                hint=f"--kv-cache-type {keys}; --engine llama-server has two",
                code="one-cache-type",
            )
        if name.endswith(".gguf"):
            path = Path(name).expanduser()
            gguf.refuse_header_only(path)
            header = gguf.read_header(path)
            model = gguf.describe(header, name, None)
            return Source(model=model, path=path.resolve(), tensors=gguf.tensor_bytes(header))
        own_name, _ = split_name(name)
        if options.sandbox == "process":
            native.find_store(name, options, os.environ)
            return Source(model=Model(name=name), own_name=name)
        folder = models_folder(options.models) if options.models is not None else None
        if folder is not None and not manifest(folder, own_name).is_file():
            there = sorted(str(one.relative_to(folder / "manifests")) for one in (folder / "manifests").glob("*/*/*/*"))
            raise NotFoundError(
                f"there is no model {own_name} in {folder}",
                hint=f"there are: {', '.join(there[:20]) or 'none'}; or pull it there first: ollama pull {own_name}",
                code="no-such-model",
            )
        lent = native.lendable(own_name, os.environ) if options.models is None else None
        return Source(model=Model(name=name), own_name=name, lent=lent)  # with its digest, which prepare() compares

    def from_header(self, header: HeaderOnly, options: Options) -> tuple[Source, Options]:
        """A scratch store that holds the sparse file under the model's digest: Ollama hashes no blob when it loads it."""
        folder, name = native.scratch(header)
        source = Source(model=header.model, tensors=header.tensors, estimate=header.estimate, own_name=name, weights="header")
        return source, msgspec.structs.replace(options, models=str(folder))

    def version(self, options: Options, client: httpx.Client | None) -> EngineVersion:
        """``GET /api/version``; of a program that is installed what ``ollama --version`` prints."""
        import httpx

        if client is None:
            program = native.find_program(options.engine_binary)
            return EngineVersion(version=None if program is None else native.program_version(program))
        try:
            body = client.get("/api/version").raise_for_status().json()
        except (httpx.HTTPError, ValueError):
            body = None
        found = body.get("version") if isinstance(body, dict) else None
        return EngineVersion(version=found if isinstance(found, str) else None)

    def launch(self, source: Source, request: LoadRequest | None, options: Options, site: Site) -> Launch:
        """The server, alone with its models. Loads get their settings by request; what only the environment sets is here.

        In a process it is the user's own program with a folder of its own, which holds links to the weights of one model.
        """
        env = {
            "OLLAMA_HOST": f"{site.host}:{site.port}",
            "OLLAMA_NUM_PARALLEL": str(options.num_parallel),
            "OLLAMA_MAX_LOADED_MODELS": "1",
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_LOAD_TIMEOUT": f"{options.timeout:.0f}s",
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_NOPRUNE": "1",
        }
        if options.kv_cache_type is not None:
            env["OLLAMA_KV_CACHE_TYPE"] = options.kv_cache_type
        if options.flash_attention != "auto":
            env["OLLAMA_FLASH_ATTENTION"] = "1" if options.flash_attention == "on" else "0"
        if request is None:
            env["OLLAMA_DEBUG"] = "1"  # the Go engine (0.12 to 0.24) prints exact bytes at this level only
            env |= _HOST_ENV if options.target == "host" else {}
        if site.sandbox == "process":
            return _process(source, options, env)
        mounts, writable, folder = _places(source, options)
        if folder is not None:
            env["OLLAMA_MODELS"] = folder
        # Kernels that the driver compiles: by default below a home that may not be written, and so lost at every load.
        env["CUDA_CACHE_PATH"] = f"{_HOME}/cuda-cache"
        return Launch(
            argv=("serve",),
            env=env | options.env,
            image=options.image,
            mounts=mounts,
            writable=writable,
            gpus=options.gpus,
            network=source.path is None and source.lent is None and options.models is None,
        )

    def ready(self, client: httpx.Client) -> bool:
        """``GET /api/version`` answers as soon as the server listens."""
        return answers_ok(client, "/api/version")

    def prepare(self, client: httpx.Client, source: Source, options: Options, progress: Progress) -> Source:
        """Pull the model, or create it of a GGUF, where it is not there; then ask the server what it is."""
        wanted = None
        if source.path is None:
            _, wanted = split_name(source.own_name)
        own_name, body = present(client, source, options, progress)
        source = msgspec.structs.replace(source, own_name=own_name)
        with connected(client, "list its models") as sdk:
            listed = {one.model: one for one in sdk.list().models}
        listing = listed.get(own_name) or listed.get(f"{own_name}:latest")
        found = described(source, body, int(listing.size) if listing and listing.size else None)
        check_digest(found, wanted, f"sha256:{listing.digest}" if listing and listing.digest else None)
        return found

    def load(self, client: httpx.Client, source: Source, request: LoadRequest, options: Options) -> Reported | None:
        """A request without a prompt loads the model at the request's settings and keeps it."""
        with connected(client, f"load {source.own_name} at {request.context:,} tokens") as sdk:
            if source.embedding:
                sdk.embed(source.own_name, "time", options=_options(request, options), keep_alive=-1)
            else:
                answer = sdk.generate(source.own_name, options=_options(request, options), keep_alive=-1)
                if not answer.done:
                    raise EngineError("Ollama gave an unexpected answer to a load", code="bad-answer")
            return _reported(sdk)

    def generate(
        self, client: httpx.Client, source: Source, request: LoadRequest, options: Options, prompt: int, tokens: int
    ) -> Speed:
        """A prompt of words. How many tokens a word takes is asked first, with a short one."""
        sample = 32
        with connected(client, f"read a prompt of {prompt:,} tokens") as sdk:
            ask = self._embed if source.embedding else self._write
            short = ask(sdk, source, request, options, sample, 1)
            words = max(1, round(prompt * sample / max(short.prompt_tokens, 1)))
            return ask(sdk, source, request, options, words, tokens)

    def _write(self, sdk: Client, source: Source, request: LoadRequest, options: Options, words: int, tokens: int) -> Speed:
        # Ollama cuts an answer that repeats one token 30 times, and says nothing of its speed then.
        settings = {**_options(request, options), "num_predict": tokens, "temperature": 0, "repeat_penalty": 1.5}
        answer = sdk.generate(source.own_name, self._prompt(words), raw=True, stream=False, options=settings, keep_alive=-1)
        if not answer.prompt_eval_count:
            raise EngineError("Ollama did not say how many tokens it has read", code="bad-answer")
        written = answer.eval_count or 0
        enough = written >= min(tokens, _TIMED_TOKENS)
        return Speed(
            prompt_tokens=answer.prompt_eval_count,
            prompt_tokens_per_s=_rate(answer.prompt_eval_count, answer.prompt_eval_duration),
            decode_tokens=written,
            decode_tokens_per_s=_rate(written, answer.eval_duration) if enough else None,
        )

    def _embed(self, sdk: Client, source: Source, request: LoadRequest, options: Options, words: int, tokens: int) -> Speed:
        answer = sdk.embed(
            source.own_name, self._prompt(words), truncate=True, options=_options(request, options), keep_alive=-1
        )
        count = answer.prompt_eval_count or words
        duration = (answer.total_duration or 0) - (answer.load_duration or 0)
        return Speed(
            prompt_tokens=count,
            prompt_tokens_per_s=_rate(count, duration),
            decode_tokens=0,
            decode_tokens_per_s=None,
        )

    def _prompt(self, words: int) -> str:
        """Words that begin otherwise each time, so that nothing of it is cached."""
        first = next(self._prompts)
        step = 1 + first // len(_WORDS) % (len(_WORDS) - 1)
        return " ".join(_WORDS[(first + step * index) % len(_WORDS)] for index in range(words))

    def unload(self, client: httpx.Client, source: Source, options: Options) -> None:
        """``keep_alive`` 0 without a prompt; Ollama answers at once and unloads in the background."""
        with connected(client, f"unload {source.own_name}") as sdk:
            sdk.generate(source.own_name, keep_alive=0)
            if not poll(lambda: not sdk.ps().models, limit=_UNLOAD):
                raise EngineError(f"Ollama did not unload {source.own_name} in {_UNLOAD:.0f} s", code="still-loaded")


def _process(source: Source, options: Options, env: dict[str, str]) -> Launch:
    """A private server of the user's program."""
    program = native.find_program(options.engine_binary)
    if program is None:
        raise UnavailableError("there is no ollama on PATH", hint="name it with --engine-binary PATH", code="no-engine")
    if source.path is None:
        name = split_name(source.own_name)[0]
        home = native.linked(native.find_store(name, options, os.environ), name)
    else:
        home = native.linked_file(source.path, source.model.digest or gguf.sha256(source.path), source.model.architecture)
    limit = options.memory_limit if options.target == "host" else None
    return Launch(
        argv=(str(program), "serve"),
        env={**env, **options.env, **native.environment(options)},
        gpus=options.gpus,
        home=home,
        memory_limit=limit,
    )


def _places(source: Source, options: Options) -> tuple[tuple[Mount, ...], tuple[str, ...], str | None]:
    """Mounts, folders that may be written, and ``OLLAMA_MODELS`` where it is not Ollama's own.

    A GGUF of the user's is sent, and goes with the container: Ollama touches its blobs, so it cannot be mounted read-only.
    """
    if source.path is not None:
        return (), (_HOME,), None
    if options.models is None and source.lent is None:
        return (Mount(kind="volume", source=VOLUME, target=_HOME, read_only=False),), (), None
    folder = source.lent or models_folder(options.models or "")
    if folder is not None:
        return (Mount(kind="bind", source=str(folder), target=_MODELS),), (_HOME,), _MODELS
    # A volume that Ollama's documentation names: mounted over ~/.ollama, with the models in a folder of it.
    return (Mount(kind="volume", source=options.models or "", target=_MODELS),), (_HOME,), f"{_MODELS}/models"


def _options(request: LoadRequest, options: Options) -> dict[str, Any]:
    """The options that decide about a load; the same on every request, or Ollama loads anew."""
    chosen: dict[str, Any] = {"num_ctx": request.context}
    if request.purpose == "point":
        chosen["num_batch"] = request.num_batch or DEFAULT_BATCH
        if options.target == "host":
            chosen["use_mmap"] = False
    if request.purpose == "host-speed":
        chosen["num_gpu"] = 0
    elif request.gpu_layers is not None:
        chosen["num_gpu"] = request.gpu_layers
    return chosen


def _reported(sdk: Client) -> Reported | None:
    """``GET /api/ps`` while one model is loaded; ``size`` is everything, ``size_vram`` what is on GPUs."""
    models = sdk.ps().models
    if len(models) != 1:
        return None
    one = models[0]
    return Reported(
        total_bytes=None if one.size is None else int(one.size),
        gpu_bytes=None if one.size_vram is None else int(one.size_vram),
        context=one.context_length,
    )


def _rate(count: int, nanoseconds: int | None) -> float | None:
    return count * 1e9 / nanoseconds if nanoseconds and nanoseconds > 0 and count > 0 else None
