"""Container images made on the spot from what this machine has, without a registry.

Each is a program with the libraries that it is linked to, put into an image by ``docker import``. They bear the label
``harness.test`` and are named after their content, so that one is built only once; one that this checkout made before from
other content is removed then.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from harness.engines.llama_server.embedded import PROGRAM as EMBEDDED
from tests.support.rpc import programs

if TYPE_CHECKING:
    from docker import DockerClient

PROGRAM = Path(__file__).with_name("engine_program.py")
OLLAMA_PROGRAM = Path(__file__).with_name("ollama_program.py")
REPOSITORY = "harness-test"
_SKIPPED = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tkinter", "turtledemo"}


def python_image(client: DockerClient, program: Path = PROGRAM, name: str = "python") -> str:
    """An image whose entry point is a program (the test engine), run by a copy of this interpreter."""
    interpreter, files = _python()
    files[f"/{program.name}"] = program
    return _image(client, name, files, entry=[interpreter, f"/{program.name}"])


def ollama_image(client: DockerClient, registry: Path, *, devices: bool = False, **knobs: str) -> str:
    """An image of the Ollama stand-in, with the embedded engine and a folder as the registry that it pulls from.

    ``devices``: with a llama-server and a ggml-rpc-server in its place (the resource ``rpc``). ``knobs`` are set in the image's
    environment (see ``ollama_program.py``): two images with different ones are two releases of the same engine.
    """
    interpreter, files = _python()
    files |= {"/ollama_program.py": OLLAMA_PROGRAM}
    files |= {f"/registry/{path.name}": path for path in registry.iterdir()}
    if devices:
        files |= _programs(programs())
        command = "/engine/llama-server"
    else:
        files |= _embedded()
        command = f"{interpreter} /engine/{EMBEDDED.name}"
    env = {"STANDIN_ENGINE": command, **knobs}
    return _image(client, "ollama", files, entry=[interpreter, "/ollama_program.py"], env=env)


def _python() -> tuple[str, dict[str, Path]]:
    """This interpreter's path, and its files by their paths in an image."""
    interpreter = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    files = {str(interpreter): interpreter}
    for path in _walk(library):
        files[str(path)] = path
    extensions = [path for path in files.values() if path.suffix == ".so"]
    return str(interpreter), files | _libraries([interpreter, *extensions])


def _programs(folder: Path) -> dict[str, Path]:
    """A folder of programs and libraries as ``/engine``, and the libraries that they need from this machine."""
    files = {f"/engine/{path.name}": path for path in folder.iterdir() if path.is_file()}
    return files | _libraries(files.values(), {"LD_LIBRARY_PATH": str(folder)}, own=folder)


def _embedded() -> dict[str, Path]:
    """The embedded engine beside the program that serves it, in ``/engine``."""
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    files = {f"/engine/xllamacpp/{path.name}": path for path in folder.iterdir() if path.suffix in (".py", ".so")}
    return {f"/engine/{EMBEDDED.name}": EMBEDDED} | files | _libraries(files.values())


def _walk(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith("config-")]
        yield from (Path(here, name) for name in names if name.endswith((".py", ".so")))


def _libraries(programs: Iterable[Path], env: dict[str, str] | None = None, own: Path | None = None) -> dict[str, Path]:
    """The libraries (and the loader) that programs are linked to, except those in the folder ``own``."""
    done = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    found = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE))
    return {path: Path(path).resolve() for path in found if own is None or not Path(path).is_relative_to(own)}


def _image(client: DockerClient, name: str, files: dict[str, Path], entry: list[str], env: dict[str, str] | None = None) -> str:
    import json

    import docker.errors

    identity = sorted((target, *_identity(path)) for target, path in files.items())
    reference = f"{REPOSITORY}/{name}:{_digest(identity, sorted((env or {}).items()))}"
    # What an image is for: of those with one purpose only the newest is of use.
    purpose = _digest(str(Path(__file__)), name, sorted((env or {}).items()))
    try:
        client.images.get(reference)
    except docker.errors.ImageNotFound:
        changes = [f"ENTRYPOINT {json.dumps(entry)}", f"LABEL harness.test={name} harness.test.purpose={purpose}"]
        changes += [f"ENV {name}={json.dumps(value)}" for name, value in (env or {}).items()]
        repository, _, tag = reference.partition(":")
        client.api.import_image_from_data(_tar(files), repository=repository, tag=tag, changes=changes)
        for image in client.images.list(filters={"label": f"harness.test.purpose={purpose}"}):
            if reference not in image.tags:
                with contextlib.suppress(docker.errors.APIError):  # a container of it still runs
                    client.images.remove(image.tags[0] if image.tags else str(image.id))
    return reference


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _tar(files: dict[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for target, path in sorted(files.items()):
            tar.add(path, target.lstrip("/"), recursive=False, filter=_plain)
        for folder in ("tmp", "models", "run"):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(member)
    return buffer.getvalue()


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.mode = 0o755
    return member
