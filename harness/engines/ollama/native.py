"""Ollama as it is installed on this machine: its program, the models that it keeps, and servers of it that run.

Facts: envconfig/config.go (``Models``, ``Host``), server/modelpath.go, manifest.go and scripts/install.sh of ollama/ollama.
Nothing of it is changed: a server of our own reads a model through links.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from harness.engines.base import HeaderOnly, Options, asked_program
from harness.engines.ollama.names import (
    blob_name,
    digests,
    local_name,
    manifest,
    models_folder,
    root_may_read,
    split_name,
)
from harness.engines.ollama.servers import processes
from harness.errors import BadInputError, CannotWriteError, HarnessError, NotFoundError, NotPermittedError, UnavailableError
from harness.sandboxes.base import PRIVATE, Home

#: Where packages and the install script put the service's models (its home is /usr/share/ollama; distributions differ).
_SERVICE_STORES: Final = (
    *("/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models", "/var/lib/ollama/models", "/var/lib/ollama"),
    "/var/snap/ollama/common/models",
)
_UNITS: Final = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_UNIT_MODELS: Final = re.compile(r"^\s*Environment=.*\bOLLAMA_MODELS=([^\"'\s]+)", re.MULTILINE)
_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
_MODEL: Final = "application/vnd.ollama.image.model"
#: Hides every GPU from it: an empty value of these hides none (docs/gpu.md).
NO_GPU: Final = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "-1",
    "OLLAMA_VULKAN": "0",
}


def find_program(binary: str | None) -> Path | None:
    """The ``ollama`` to run: the one asked for, else the one on PATH; ``None`` where there is none.

    Raises:
        NotFoundError, NotPermittedError: of one that was asked for. BadInputError: it is another program.
    """
    if binary is None:
        found = shutil.which("ollama")
        return Path(found) if found else None
    path = asked_program(binary)
    if "llama-server" in path.name or path.name == "vllm":
        raise BadInputError(
            f"{path} is not an Ollama: --engine-binary is the program of the engine that runs",
            hint="for this program: --engine llama-server or --engine vllm",
            code="other-engine-binary",
        )
    return path


def program_files(program: Path) -> tuple[Path, ...]:
    """The program and the runner that it starts (llm/llama_server.go, ``LibOllamaPath``); those that are there."""
    real = program.resolve()
    places = (real.parent / "lib" / "ollama", real.parent.parent / "lib" / "ollama", real.parent)
    runners = [folder / "llama-server" for folder in places]
    return (real, *(one for one in runners if one.is_file()))


def program_version(program: Path) -> str | None:
    """What ``ollama --version`` says of the program itself; ``None`` where it does not run.

    It asks the server at ``OLLAMA_HOST`` first and prints that one's version where it answers: so it is sent to where none is.
    """
    env = {"HOME": os.environ.get("HOME", "/"), "PATH": os.environ.get("PATH", os.defpath), "OLLAMA_HOST": "127.0.0.1:1"}
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"version is (\S+)", done.stdout + done.stderr)
    return found[1] if found else None


def stores(options: Options, environ: Mapping[str, str], proc: Path = Path("/proc")) -> tuple[Path, ...]:
    """Folders where models of this machine's Ollama may lie, those that were named first.

    Raises:
        NotFoundError: ``--models`` names none.
    """
    if options.models is not None:
        folder = models_folder(options.models)
        if folder is None:
            raise NotFoundError(
                f"{options.models} is the name of a Docker volume, and a process has none",
                hint="--models with a folder, as in --models ~/.ollama",
                code="no-models",
            )
        return (folder,)
    named = [environ.get("OLLAMA_MODELS"), *(one.settings.get("OLLAMA_MODELS") for one in processes(proc)), *_of_units()]
    own = str(Path(environ.get("HOME") or "/root") / ".ollama" / "models")
    return tuple(dict.fromkeys(Path(one) for one in (*named, own, *_SERVICE_STORES) if one))


def _of_units() -> Iterator[str]:
    for folder in _UNITS:
        for file in (Path(folder) / "ollama.service", *sorted(Path(folder).glob("ollama.service.d/*.conf"))):
            try:
                yield from _UNIT_MODELS.findall(file.read_text("utf-8", "replace"))
            except OSError:
                continue


def find_store(name: str, options: Options, environ: Mapping[str, str]) -> Path:
    """The folder that has a model.

    Raises:
        NotFoundError: none has it; the hint names what is there. NotPermittedError: only another account may read it.
    """
    own_name, _ = split_name(name)
    closed: list[Path] = []
    there: list[str] = []
    for folder in stores(options, environ):
        path = manifest(folder, own_name)
        try:
            text = path.read_bytes()
        except PermissionError:
            closed.append(folder)
            continue
        except OSError:
            there += _names(folder)
            continue
        if all(os.access(folder / "blobs" / blob_name(digest), os.R_OK) for digest in digests(text)):
            return folder
        closed.append(folder)
    if closed:
        raise NotPermittedError(
            f"the models in {closed[0]} may be read by the account {_owner(closed[0])} alone",
            hint="run harness as root, or lend a copy that you may read: --models DIR",
            code="models-not-readable",
        )
    raise NotFoundError(
        f"Ollama on this machine has no model {own_name}",
        hint=f"there are: {', '.join(sorted(there)[:20]) or 'none'}; pull it first: ollama pull {own_name}",
        code="no-such-model",
    )


def lendable(name: str, environ: Mapping[str, str]) -> Path | None:
    """A folder of this machine's Ollama that has a model, and that a container may read; ``None``: none has it."""
    own_name = split_name(name)[0]
    for folder in stores(Options(), environ):
        with suppress(OSError, HarnessError):
            text = manifest(folder, own_name).read_bytes()
            blobs = [folder / "blobs" / blob_name(digest) for digest in digests(text)]
            if all(os.access(blob, os.R_OK) for blob in blobs) and root_may_read(folder, own_name):
                return folder.resolve()
    return None


def _names(folder: Path) -> list[str]:
    """Models as people call them."""
    try:
        found = [one.relative_to(folder / "manifests").parts for one in (folder / "manifests").glob("*/*/*/*")]
    except OSError:
        return []
    library = ("registry.ollama.ai", "library")
    return [f"{name}:{tag}" if (host, space) == library else f"{host}/{space}/{name}:{tag}" for host, space, name, tag in found]


def _owner(folder: Path) -> str:
    while folder != folder.parent:
        try:
            return folder.owner()
        except (OSError, KeyError):
            folder = folder.parent
    return "of the service"


def linked(folder: Path, name: str) -> Home:
    """A store of a server's own that holds one model: a copy of its manifest, and links to the weights.

    Ollama never writes into a file that it reads a model from; what it makes or removes, it makes and removes beside the links.
    """
    path = manifest(folder, split_name(name)[0])
    text = path.read_bytes()
    blobs = {f"models/blobs/{blob_name(digest)}": str(folder / "blobs" / blob_name(digest)) for digest in digests(text)}
    return Home(files={f"models/{path.relative_to(folder)}": text}, links=blobs)


def linked_file(path: Path, digest: str, architecture: str | None) -> Home:
    """A store that holds a GGUF of the user's, by a link: what ``ollama create`` would write, without a copy of the weights."""
    config = json.dumps(
        {
            "model_format": "gguf",
            "model_family": architecture or "",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest]},
        }
    ).encode()
    own = _sha256(config)
    layers: list[dict[str, Any]] = [{"mediaType": _MODEL, "digest": digest, "size": path.stat().st_size}]
    document = {
        "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": _CONFIG, "digest": own, "size": len(config)}, "layers": layers,
    }  # fmt: skip
    name = manifest(Path("models"), local_name(digest))
    files = {str(name): json.dumps(document).encode(), f"models/blobs/{blob_name(own)}": config}
    return Home(files=files, links={f"models/blobs/{blob_name(digest)}": str(path)})


def scratch(header: HeaderOnly) -> tuple[Path, str]:
    """A store in harness's cache that holds a model without weights, and the model's name there.

    Its manifest is the registry's own where there is one, else as of a file. Blobs are links to the sparse files.

    Raises:
        BadInputError: a model in several parts, of which a store can hold none. CannotWriteError: the folder.
    """
    if len(header.parts) != 1:
        raise BadInputError(
            f"{header.name} is split into {len(header.parts)} files, and Ollama loads one",
            hint="--engine llama-server measures it",
            code="split-model",
        )
    folder = header.folder / "ollama"
    if header.manifest is not None and header.digest is not None:
        name = split_name(header.own_name)[0]
        files = {str(manifest(Path(), name)): header.manifest}
        links = {f"blobs/{blob_name(digest)}": path for digest, path in header.documents.items()}
        links[f"blobs/{blob_name(header.digest)}"] = header.parts[0]
        if header.projector is not None and header.projector_digest is not None:
            links[f"blobs/{blob_name(header.projector_digest)}"] = header.projector
    else:
        # Of a file whose digest is not known, the blob bears that of its header: it is no model's.
        digest = header.digest or _sha256(header.source.encode())
        name = local_name(digest)
        home = linked_file(header.parts[0], digest, header.model.architecture)
        files = {path.removeprefix("models/"): data for path, data in home.files.items()}
        links = {path.removeprefix("models/"): Path(target) for path, target in home.links.items()}
    try:
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        (folder / "blobs").mkdir(exist_ok=True)
        for path, target in links.items():
            (folder / path).unlink(missing_ok=True)
            os.link(target, folder / path)
    except OSError as error:
        raise CannotWriteError(f"{folder} cannot be written: {error.strerror}", code="no-cache") from error
    return folder, name


def _sha256(data: bytes) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def environment(options: Options) -> dict[str, str]:
    """What makes a server's folders its own, and shows it the GPUs that it is to use.

    Raises:
        UnavailableError: GPUs by names that are not NVIDIA's.
    """
    own = {"HOME": PRIVATE, "OLLAMA_MODELS": f"{PRIVATE}/models"}
    if options.gpus.mode == "none":
        return {**NO_GPU, **own}
    if options.gpus.mode == "ids":
        if odd := [one for one in options.gpus.ids if not one.isdigit() and not one.startswith(("GPU-", "MIG-"))]:
            raise UnavailableError(
                f"Ollama takes GPUs by NVIDIA's indices or UUIDs, not {odd[0]}", hint="--gpus all", code="no-such-gpu"
            )
        return {**own, "CUDA_VISIBLE_DEVICES": ",".join(options.gpus.ids)}
    return own
