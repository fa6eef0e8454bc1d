"""vLLM: one server for each start, whose KV cache is sized by a share of the GPU or by bytes.

Facts: vllm/entrypoints/openai, vllm/engine/arg_utils.py, vllm/v1/metrics/loggers.py, releases 0.6 to 0.33. The image's entry
point changed from a Python module to ``vllm serve``; ``--model`` works with both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness.engines.base import NO_ANSWER, Engine, Options, Source, answers_ok, asked_program
from harness.engines.settings import ARGUMENTS
from harness.engines.vllm.policy import VllmPolicy, arguments, max_num_seqs
from harness.engines.vllm.safetensors import tensor_bytes
from harness.errors import EngineError, NotFoundError
from harness.model.record import EngineVersion, LoadRequest, Model, Reported, Speed
from harness.sandboxes.base import SECRETS, Launch, Mount, Site

if TYPE_CHECKING:
    import httpx

#: Volumes that keep weights and compiled graphs: a warm compile cache changes what profiling finds.
WEIGHTS_VOLUME: Final = "harness-huggingface"
CACHE_VOLUME: Final = "harness-vllm"
_HUGGINGFACE: Final = "/root/.cache/huggingface"
_CACHE: Final = "/root/.cache/vllm"
_TOKEN: Final = "hf_token"  # noqa: S105 - the name of a file
_TOKEN_NAMES: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_CACHE_CONFIG: Final = re.compile(r"^vllm:cache_config_info\{(?P<labels>.{0,16384}?)\} 1", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Vllm(Engine):
    """Recipe of vLLM."""

    policy: Final = VllmPolicy()
    name: Final = policy.name
    persistent: Final = False
    sandboxes: Final = ("docker", "process")

    def installed(self, options: Options) -> tuple[Path, ...]:
        """The program ``vllm``, which starts the rest of its package."""
        if options.engine_binary is not None:
            return (asked_program(options.engine_binary),)
        found = shutil.which("vllm")
        return () if found is None else (Path(found),)

    def leaves_alone(self, integrated: bool, gfx: int | None, env: dict[str, str]) -> bool:
        """All but NVIDIA's: its figures here are of those."""
        return True

    def resolve(self, name: str, options: Options) -> Source:
        """A folder with weights and ``config.json``, or a name of the Hugging Face hub, which the engine itself fetches."""
        folder = Path(name).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise NotFoundError(f"there is no config.json in {folder}", code="no-such-model")
            model = _described(folder / "config.json", folder.resolve().name)
            return Source(model=model, own_name=str(folder.resolve()), tensors=tensor_bytes(folder))
        if name.endswith(".gguf") or name.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(name):
            raise NotFoundError(
                f"vLLM cannot reach {name!r}",
                hint="give a name of the Hugging Face hub (ORG/NAME), or a folder with config.json and weights",
                code="no-such-model",
            )
        config = _cached_config(name, options)
        if config is None:
            return Source(model=Model(name=name), own_name=name)
        return Source(model=_described(config, name), own_name=name, tensors=tensor_bytes(config.parent))

    def version(self, options: Options, client: httpx.Client | None) -> EngineVersion:
        """``GET /version``; not known before a server runs (its own ``--version`` takes half a minute)."""
        body = _json(client, "/version") if client is not None else None
        found = body.get("version") if isinstance(body, dict) else None
        return EngineVersion(version=found if isinstance(found, str) else None)

    def launch(self, source: Source, request: LoadRequest | None, options: Options, site: Site) -> Launch:
        """One server at one length, its cache sized by a share of the GPU or by bytes."""
        if request is None:
            raise ValueError("vLLM loads a model at each start")
        local = Path(source.own_name).is_absolute()
        model, mounts = site.place(Path(source.own_name)) if local else (source.own_name, ())
        argv: list[str] = [options.engine_binary or "vllm", "serve", model] if site.sandbox == "process" else ["--model", model]
        argv += ["--host", site.host, "--port", str(site.port)]
        argv += ["--max-model-len", str(request.context), "--max-num-seqs", str(max_num_seqs(options))]
        if request.num_batch is not None:
            argv += ["--max-num-batched-tokens", str(request.num_batch)]
        if request.utilization is not None:
            argv += ["--gpu-memory-utilization", f"{request.utilization:.4f}"]
        if request.kv_cache_bytes is not None:
            argv += ["--kv-cache-memory-bytes", str(request.kv_cache_bytes)]
        if options.kv_cache_type is not None:
            argv += ["--kv-cache-dtype", options.kv_cache_type]
        if source.weights == "header":
            argv += ["--load-format", "dummy"]
        argv += arguments(options)
        env = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "NO_COLOR": "1",
            "VLLM_ENGINE_READY_TIMEOUT_S": f"{options.timeout:.0f}",
        }
        if request.purpose == "point":
            env["VLLM_LOGGING_LEVEL"] = "DEBUG"  # from 0.11.2 to 0.25 the line with the GPU's total stands at this level
        if local:
            env["HF_HUB_OFFLINE"] = "1"
        secrets = {} if local else _secrets(options)
        if secrets:
            env["HF_TOKEN_PATH"] = f"{SECRETS}/{_TOKEN}"
        if options.gpus.mode == "ids" and site.sandbox == "process":
            env["CUDA_VISIBLE_DEVICES"] = ",".join(options.gpus.ids)
        if site.sandbox == "docker":
            mounts = (*mounts, *_volumes(options))
            env |= _CACHES
        own = {key: value for key, value in options.env.items() if key != ARGUMENTS and key not in _TOKEN_NAMES}
        return Launch(
            argv=tuple(argv),
            env=env | own,
            image=options.image,
            mounts=mounts,
            gpus=options.gpus,
            ipc_host=True,
            network=not local,
            secrets=secrets,
        )

    def ready(self, client: httpx.Client) -> bool:
        """``GET /health``: nothing listens before the engine is initialised; 503 means that it has died."""
        return answers_ok(client, "/health")

    def load(self, client: httpx.Client, source: Source, request: LoadRequest, options: Options) -> Reported:
        """It was loaded at start: what the engine says of its cache (labels exist in part before 0.25)."""
        models = _json(client, "/v1/models")
        try:
            context = int(models["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            context = None
        labels = cache_labels(_text(client, "/metrics"))
        return Reported(
            context=context,
            version=self.version(options, client).version,
            block_size=_whole(labels.get("effective_attention_block_size")) or _whole(labels.get("block_size")),
            num_blocks=_whole(labels.get("num_gpu_blocks")),
            max_concurrency=_number(labels.get("kv_cache_max_concurrency")),
        )

    def generate(
        self, client: httpx.Client, source: Source, request: LoadRequest, options: Options, prompt: int, tokens: int
    ) -> Speed:
        """``POST /v1/completions``, streamed, with token ids: the first piece ends the prompt's time."""
        import httpx

        seed = time.monotonic_ns() % 997  # another prompt each time, or the prefix cache answers
        body = {
            "model": source.own_name if not Path(source.own_name).is_absolute() else self._served(client),
            "prompt": [100 + (seed + index * 37) % 900 for index in range(prompt)],
            "max_tokens": tokens,
            "min_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        begin = time.monotonic()
        try:
            with client.stream("POST", "/v1/completions", json=body, timeout=options.timeout) as answer:
                answer.raise_for_status()
                lines = (line for line in answer.iter_lines() if line.startswith("data:") and "[DONE]" not in line)
                pieces = [time.monotonic() for _ in lines]
        except httpx.HTTPError as error:
            raise EngineError(f"vLLM did not answer a prompt of {prompt:,} tokens: {error}", code=NO_ANSWER) from error
        if not pieces:
            raise EngineError(f"vLLM wrote nothing after a prompt of {prompt:,} tokens")
        writing = pieces[-1] - pieces[0]
        return Speed(
            prompt_tokens=prompt,
            prompt_tokens_per_s=prompt / (pieces[0] - begin) if pieces[0] > begin else None,
            decode_tokens=tokens,
            decode_tokens_per_s=(tokens - 1) / writing if tokens > 1 and writing > 0 else None,
        )

    def _served(self, client: httpx.Client) -> str:
        models = _json(client, "/v1/models")
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError("vLLM does not say which model it serves") from error


#: Everything that is written is in the two volumes or below /tmp: the image's own files stay as they are.
_CACHES: Final = {
    "HOME": "/tmp",  # noqa: S108 - a path inside the container
    "HF_HOME": _HUGGINGFACE,
    "VLLM_CACHE_ROOT": _CACHE,
    "TRITON_CACHE_DIR": f"{_CACHE}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE}/inductor",
    "FLASHINFER_WORKSPACE_BASE": _CACHE,
}


def cache_labels(metrics: str | None) -> dict[str, str]:
    """The labels of ``vllm:cache_config_info``; empty where statistics are off."""
    found = _CACHE_CONFIG.search(metrics or "")
    return dict(_LABEL.findall(found["labels"])) if found else {}


def _described(config: Path, name: str) -> Model:
    try:
        values: dict[str, Any] = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return Model(name=name)
    text = values.get("text_config") if isinstance(values.get("text_config"), dict) else {}
    architectures = values.get("architectures") or [None]
    quantization = values.get("quantization_config") or {}

    def number(key: str) -> int | None:
        value = values.get(key, (text or {}).get(key))
        return value if isinstance(value, int) and value > 0 else None

    return Model(
        name=name,
        architecture=architectures[0] if isinstance(architectures[0], str) else None,
        quantization=quantization.get("quant_method") if isinstance(quantization, dict) else None,
        train_context=number("max_position_embeddings"),
        layers=number("num_hidden_layers"),
    )


def _cached_config(name: str, options: Options) -> Path | None:
    """``config.json`` of a model that the hub's cache holds already (huggingface_hub's layout); newest snapshot."""
    root = Path(options.models).expanduser() if options.models and "/" in options.models else None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = (root or home) / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    try:
        found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return None
    return found[-1] if found else None


def _secrets(options: Options) -> dict[str, str]:
    """The hub's token, from ``--env`` or from our own environment: a file of mode 0400, never a variable."""
    for place in (options.env, os.environ):
        for name in _TOKEN_NAMES:
            if token := place.get(name, "").strip():
                return {_TOKEN: token}
    return {}


def _volumes(options: Options) -> tuple[Mount, ...]:
    source = options.models or WEIGHTS_VOLUME
    bind = "/" in source or source.startswith((".", "~"))
    weights = Mount(
        kind="bind" if bind else "volume",
        source=str(Path(source).expanduser().resolve()) if bind else source,
        target=_HUGGINGFACE,
        read_only=False,
    )
    return (weights, Mount(kind="volume", source=CACHE_VOLUME, target=_CACHE, read_only=False))


def _text(client: httpx.Client, path: str) -> str | None:
    import httpx

    try:
        answer = client.get(path)
    except httpx.HTTPError:
        return None
    return answer.text if answer.status_code == httpx.codes.OK else None


def _json(client: httpx.Client, path: str) -> Any:
    text = _text(client, path)
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 12 else None


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,12}(?:\.\d{1,18})?", text) else None
