"""An Ollama of the tests' own: speaks Ollama's API, logs as Ollama does, and starts the real llama-server for each load.

Standard library only. Models come from ``/registry``, which ``registry.json`` describes; they are kept as Ollama keeps them.
Flags of the runner, log lines and error texts are those of Ollama 0.33 (llm/llama_server.go, server/routes.go).

The environment makes it misbehave, or another release:

- ``STANDIN_ENGINE``: the command of its llama-server
- ``STANDIN_VERSION``: what it says it is
- ``STANDIN_ARGS``: more flags of llama-server (``--swa-full``: a larger window cache, ``-fa off``: compute that grows)
- ``STANDIN_HOLD``: MiB that every runner holds besides
- ``STANDIN_RPC``: every runner finds a device (llama.cpp's own RPC server); contexts beyond so many tokens spill to the host
- ``STANDIN_PULL``: what goes wrong in one pull after another: ``cut``, ``error``, ``silent-end``, ``digest``
- ``STANDIN_FAULT``: ``WHAT@LOAD`` from 1 (0: its start): ``crash``, ``kill-runner``, ``garbage``, ``bloat``, ``hang`` (until
  SIGUSR1); ``LOAD+``: from there on
- ``STANDIN_REWRITES``: a file that it is sent is kept with other bytes, as Ollama adds what a header lacks
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

REGISTRY = Path(os.environ.get("STANDIN_REGISTRY", "/registry"))
MODELS = Path(os.environ.get("OLLAMA_MODELS") or "/root/.ollama/models")
VERSION = os.environ.get("STANDIN_VERSION", "0.33.0")
FAULT, _, FAULT_AT = os.environ.get("STANDIN_FAULT", "").partition("@")


def faulty(load: int) -> bool:
    """Whether this load is the one to fail, or one of them."""
    return str(load) == FAULT_AT or (FAULT_AT.endswith("+") and load >= int(FAULT_AT[:-1]))


PULL_FAULTS = [one for one in os.environ.get("STANDIN_PULL", "").split(",") if one]
ENGINE = shlex.split(os.environ.get("STANDIN_ENGINE", "/engine/llama-server"))
FOLDER = Path(ENGINE[-1]).parent
LIBRARIES = {**os.environ, "LD_LIBRARY_PATH": str(FOLDER)}
#: The embedded engine has this one as a flag alone.
NO_REPACK = ["--no-repack"] if LIBRARIES.pop("LLAMA_ARG_REPACK", "1") == "0" else []
CHUNK = 1 << 18
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144), 14: ("Q6_K", 256, 210)}
#: As Go's os.ProcessState prints them.
SIGNALS = {signal.SIGKILL: "killed", signal.SIGILL: "illegal instruction", signal.SIGSEGV: "segmentation fault"}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
GO_ON = threading.Event()
loads = 0


def slog(message: str, level: str = "INFO", **fields: object) -> None:
    """One line as Go's log/slog writes it, to stderr."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    rest = "".join(f" {key}={json.dumps(str(value)) if ' ' in str(value) else value}" for key, value in fields.items())
    os.write(2, f"time={now} level={level} source=standin.py:1 msg={json.dumps(message)}{rest}\n".encode())


class ApiError(Exception):
    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text


# -- models on disk ----------------------------------------------------------------------------------------------------


def manifest_path(name: str) -> Path:
    rest, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "latest")
    parts = ["registry.ollama.ai", "library", *rest.split("/")]
    return MODELS / "manifests" / "/".join(parts[-3:] if len(parts) > 4 else parts[:2] + parts[-1:]) / tag


def blob_path(digest: str) -> Path:
    return MODELS / "blobs" / digest.replace(":", "-")


def known(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(manifest_path(name).read_text())
    except (OSError, ValueError):
        raise ApiError(404, f"model '{name}' not found") from None
    return found


def keep(name: str, digest: str, size: int, about: dict[str, Any]) -> None:
    path = manifest_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": size}
    path.write_text(json.dumps({"schemaVersion": 2, "layers": [layer], "about": about}))


def read_gguf(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metadata (arrays as ``None``) and tensors of a GGUF (ggml/docs/gguf.md)."""
    with path.open("rb") as file:
        _, _, tensors, fields = struct.unpack("<4sIQQ", file.read(24))
        metadata = {}
        for _ in range(fields):
            key = text(file)
            metadata[key] = value(file, number("<I", file))
        listed = []
        for _ in range(tensors):
            name, dimensions = text(file), number("<I", file)
            shape = list(struct.unpack(f"<{dimensions}Q", file.read(8 * dimensions)))
            listed.append({"name": name, "type": TYPES[number("<I", file)][0], "shape": shape})
            file.seek(8, 1)
        return metadata, listed


def number(layout: str, file: BinaryIO) -> Any:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def text(file: BinaryIO) -> str:
    return file.read(number("<Q", file)).decode()


def value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return text(file)
    if kind != 9:
        return number(SCALARS[kind], file)
    inner, count = number("<I", file), number("<Q", file)
    for _ in range(count):
        value(file, inner)
    return None


# -- the runner --------------------------------------------------------------------------------------------------------


class Runner:
    """One loaded model: the real llama-server, and what knobs add."""

    lock = threading.Lock()
    current: Runner | None = None

    def __init__(self, name: str, blob: Path, options: dict[str, Any], embedding: bool) -> None:
        self.name, self.key = name, json.dumps([name, sorted(options.items())])
        self.context = int(options.get("num_ctx", 4096))
        self.others: list[subprocess.Popen[bytes]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        parallel = int(os.environ.get("OLLAMA_NUM_PARALLEL", "1"))
        command = [*ENGINE, "--model", str(blob), "--port", str(self.port), "--host", "127.0.0.1", "--no-webui", "--offline"]
        command += ["-c", str(self.context * parallel), "-np", str(parallel)]
        command += [*NO_REPACK, "--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps"]
        if options.get("use_mmap") is False:
            command += ["--load-mode", "none"]
        if kind := os.environ.get("OLLAMA_KV_CACHE_TYPE"):
            command += ["--cache-type-k", kind, "--cache-type-v", kind]
        flash = {"1": "on", "0": "off"}.get(os.environ.get("OLLAMA_FLASH_ATTENTION", ""), "auto")
        command += ["--flash-attn", flash]
        batch = int(options.get("num_batch") or (512 if self.context <= 4096 else 1024 if self.context <= 32768 else 2048))
        batch = min(batch, self.context) if embedding else batch
        command += [*(["--embedding"] if embedding else []), "-b", str(batch), "-ub", str(batch)]
        layers = int(options.get("num_gpu", -1))
        if room := os.environ.get("STANDIN_RPC"):
            command += ["--rpc", self.device(), "-dev", "RPC0"]
            layers = 99 if self.context <= int(room) else 1
        if layers >= 0:
            command += ["-ngl", str(layers)]
        command += shlex.split(os.environ.get("STANDIN_ARGS", ""))
        if hold := os.environ.get("STANDIN_HOLD"):
            holder = subprocess.Popen([sys.executable, __file__, "hold", hold], stdout=subprocess.PIPE)
            self.others.append(holder)
            if holder.stdout is not None:
                holder.stdout.readline()  # it has all of it before the load begins
        slog("starting llama-server", cmd=" ".join(command))
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, stdout=2, stderr=2, env=LIBRARIES)

    def device(self) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        server = subprocess.Popen(
            [f"{FOLDER}/ggml-rpc-server", "-d", "CPU", "-p", port],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=LIBRARIES,
        )
        self.others.append(server)
        while server.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(port))).close()
                break
            time.sleep(0.01)
        return f"127.0.0.1:{port}"

    def wait(self) -> None:
        while True:
            if (status := self.process.poll()) is not None:
                how = f"signal: {SIGNALS.get(signal.Signals(-status), str(-status))}" if status < 0 else f"exit status {status}"
                slog("error loading llama server", "ERROR", error=f"llama-server process has terminated: {how}")
                raise ApiError(500, f"llama-server process has terminated: {how}")
            with contextlib.suppress(OSError, ApiError):
                self.ask("/health")
                break
            time.sleep(0.01)
        slog(f"llama-server started in {time.monotonic() - self.began:.2f} seconds")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode("utf-8", "replace")) from None

    def close(self) -> None:
        for process in (self.process, *self.others):
            process.kill()
            process.wait()


def end(*_: object) -> None:
    """As Ollama does: the runner goes with its server."""
    if Runner.current is not None:
        Runner.current.close()
    os._exit(0)


def misbehave(at: int) -> None:
    """What ``STANDIN_FAULT`` wants of this load."""
    if not faulty(at):
        return
    if FAULT == "crash":
        slog("panic: runtime error: invalid memory address or nil pointer dereference", "ERROR")
        os._exit(2)
    if FAULT == "garbage":
        raise ApiError(200, "")
    if FAULT == "hang":
        GO_ON.wait()
    if FAULT == "bloat":
        bytearray(1 << 30)


def loaded(name: str, options: dict[str, Any]) -> Runner:
    """The runner of a request: anew where its options differ (server/sched.go, ``needsReload``)."""
    global loads
    found = known(name)
    decides = {key: one for key, one in options.items() if key in ("num_ctx", "num_batch", "num_gpu", "use_mmap")}
    with Runner.lock:
        if Runner.current is not None and Runner.current.key == json.dumps([name, sorted(decides.items())]):
            return Runner.current
        if Runner.current is not None:
            Runner.current.close()
            Runner.current = None
        loads += 1
        misbehave(loads)
        embedding = found.get("about", {}).get("capabilities") == ["embedding"]
        runner = Runner(name, blob_path(found["layers"][0]["digest"]), decides, embedding)
        if FAULT == "kill-runner" and faulty(loads):
            runner.process.kill()
        try:
            runner.wait()
        except ApiError:
            runner.close()
            raise
        Runner.current = runner
        return runner


def unload() -> None:
    with Runner.lock:
        if Runner.current is not None:
            Runner.current.close()
        Runner.current = None


# -- the API -----------------------------------------------------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(self.blob)

    def do_GET(self) -> None:
        routes = {"/api/version": self.version, "/api/tags": self.tags, "/api/ps": self.ps}
        self.answer(routes.get(self.path))

    def do_POST(self) -> None:
        if self.path.startswith("/api/blobs/"):
            self.answer(self.take_blob)
            return
        self.body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        routes = {
            "/api/show": self.show, "/api/generate": self.generate, "/api/embed": self.embed, "/api/pull": self.pull,
            "/api/create": self.create,
        }  # fmt: skip
        self.answer(routes.get(self.path))

    def answer(self, route: Any) -> None:
        status = 200
        try:
            result = (route or self.nothing)()
            if result is not None:
                self.send(200, json.dumps(result))
        except ApiError as error:
            status = error.status
            self.send(status, json.dumps({"error": error.text}) if error.text else "<html>not JSON")
        stamp = datetime.now(UTC).strftime("%Y/%m/%d - %H:%M:%S")
        os.write(1, f'[GIN] {stamp} | {status} |       1.0ms |      172.17.0.1 | {self.command:<8} "{self.path}"\n'.encode())

    def send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def stream(self) -> Any:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def line(**fields: object) -> None:
            self.wfile.write(json.dumps(fields).encode() + b"\n")
            self.wfile.flush()

        return line

    def blob(self) -> Any:
        if not blob_path(self.path.rpartition("/")[2]).exists():
            raise ApiError(404, "blob not found")
        return {}

    def take_blob(self) -> Any:
        """A body in chunks, with its digest in the path."""
        digest = self.path.rpartition("/")[2]
        target = blob_path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = hashlib.sha256()
        try:
            with target.open("wb") as out:
                while size := int(self.rfile.readline(), 16):
                    found.update(block := self.rfile.read(size))
                    out.write(block)
                    self.rfile.readline()
                self.rfile.readline()
        except OSError as error:
            self.close_connection = True
            raise ApiError(500, f"write {target}: {(error.strerror or '').lower()}") from None
        if f"sha256:{found.hexdigest()}" != digest:
            raise ApiError(400, f"digest mismatch, expected {digest!r}, got {found.hexdigest()!r}")
        return {}

    def nothing(self) -> Any:
        raise ApiError(404, "404 page not found")

    def version(self) -> Any:
        return {"version": VERSION}

    def tags(self) -> Any:
        folder = MODELS / "manifests" / "registry.ollama.ai" / "library"
        names = [(f"{path.parent.name}:{path.name}", path) for path in sorted(folder.glob("*/*"))]
        sizes = {name: json.loads(path.read_text())["layers"][0]["size"] for name, path in names}
        listed = [{"name": name, "model": name, "digest": sha256(path), "size": sizes[name]} for name, path in names]
        return {"models": listed}

    def ps(self) -> Any:
        runner = Runner.current
        if runner is None:
            return {"models": []}
        size = blob_path(known(runner.name)["layers"][0]["digest"]).stat().st_size
        one = {"name": runner.name, "model": runner.name, "size": size, "size_vram": 0, "context_length": runner.context}
        return {"models": [one]}

    def show(self) -> Any:
        found = known(self.body["model"])
        about = found.get("about", {})
        blob = blob_path(found["layers"][0]["digest"])
        metadata, tensors = read_gguf(blob)
        parameters = sum(math.prod(one["shape"]) for one in tensors)
        body = {
            "modelfile": f'# Modelfile generated by "ollama show"\n\nFROM {blob}\nTEMPLATE {{{{ .Prompt }}}}\n',
            "details": {
                "format": about.get("format", "gguf"),
                "family": metadata.get("general.architecture"),
                "quantization_level": "F16",
            },
            "model_info": {**metadata, "general.parameter_count": parameters},
            "capabilities": about.get("capabilities", ["completion"]),
        }
        if "remote_host" in about:
            body |= {"remote_host": about["remote_host"], "remote_model": self.body["model"]}
        return body | ({"tensors": tensors} if self.body.get("verbose") else {})

    def generate(self) -> Any:
        name, prompt = self.body["model"], self.body.get("prompt") or ""
        found = known(name)
        if not prompt and self.body.get("keep_alive") == 0:
            threading.Thread(target=unload).start()
            return {"model": name, "response": "", "done": True, "done_reason": "unload"}
        if found.get("about", {}).get("capabilities") == ["embedding"]:
            raise ApiError(400, f'"{name}" does not support generate')
        options = self.body.get("options") or {}
        runner = loaded(name, options)
        if not prompt:
            return {"model": name, "response": "", "done": True, "done_reason": "load"}
        settings = {"n_predict": options.get("num_predict", 16), "temperature": options.get("temperature", 0.8)}
        done = runner.ask("/completion", {"prompt": prompt, "cache_prompt": True, **settings})
        timings = done["timings"]
        return {
            "model": name, "response": done["content"], "done": True, "done_reason": "stop",
            "prompt_eval_count": timings["prompt_n"], "prompt_eval_duration": int(timings["prompt_ms"] * 1e6),
            "eval_count": timings["predicted_n"], "eval_duration": int(timings["predicted_ms"] * 1e6),
        }  # fmt: skip

    def embed(self) -> Any:
        runner = loaded(self.body["model"], self.body.get("options") or {})
        begin = time.monotonic()
        [found] = runner.ask("/embedding", {"content": self.body["input"]})
        count = len(runner.ask("/tokenize", {"content": self.body["input"]})["tokens"])
        spent = int((time.monotonic() - begin) * 1e9)
        vectors = [[float(one) for one in found["embedding"][0]]]
        return {"model": self.body["model"], "embeddings": vectors, "total_duration": spent, "load_duration": 0,
                "prompt_eval_count": count}  # fmt: skip

    def create(self) -> None:
        [digest] = self.body["files"].values()
        line = self.stream()
        line(status="parsing GGUF")
        try:
            read_gguf(blob_path(digest))
            if os.environ.get("STANDIN_REWRITES"):
                longer = blob_path(digest).read_bytes() + b"kept"
                digest = f"sha256:{hashlib.sha256(longer).hexdigest()}"
                blob_path(digest).write_bytes(longer)
            keep(self.body["model"], digest, blob_path(digest).stat().st_size, {})
        except OSError as error:
            line(error=str(error))
            return
        line(status="writing manifest")
        line(status="success")

    def pull(self) -> None:
        name = self.body["model"]
        fault = PULL_FAULTS.pop(0) if PULL_FAULTS else ""
        slog("pull", model=name, insecure=self.body.get("insecure", False))
        line = self.stream()
        line(status="pulling manifest")
        registry = json.loads((REGISTRY / "registry.json").read_text())
        about = registry.get(name if ":" in name else f"{name}:latest")
        if about is None:
            line(error="pull model manifest: file does not exist")
            return
        source = REGISTRY / about["file"]
        digest, size = f"sha256:{sha256(source)}", source.stat().st_size
        try:
            self.download(source, digest, size, fault, line)
            if fault in ("cut", "error", "silent-end"):
                return
            line(status="verifying sha256 digest")
            if fault == "digest":
                blob_path(digest).unlink()
                line(error="digest mismatch, file must be downloaded again: want sha256:aa, got sha256:bb")
                return
            line(status="writing manifest")
            keep(name, digest, size, about)
        except OSError as error:
            line(error=f"write {error.filename}: {(error.strerror or '').lower()}")
            return
        line(status="success")

    def download(self, source: Path, digest: str, size: int, fault: str, line: Any) -> None:
        """Copy in pieces behind what an earlier try left; a broken one ends half way."""
        target = blob_path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + "-partial")
        done = partial.stat().st_size if partial.exists() else 0
        slog("downloading", digest=digest, resumed_at=done)
        short = f"pulling {digest[7:19]}"
        with source.open("rb") as file, partial.open("ab") as out:
            file.seek(done)
            while block := file.read(CHUNK):
                try:
                    out.write(block)
                    out.flush()
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(partial)) from error
                done += len(block)
                line(status=short, digest=digest, total=size, completed=done)
                if done >= size // 2 and fault in ("cut", "error", "silent-end"):
                    if fault == "error":
                        line(error="max retries exceeded: EOF")
                    if fault == "cut":
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
        partial.replace(target)

    def log_message(self, *_: object) -> None:
        pass


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def serve() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: GO_ON.set())
    host, _, port = os.environ.get("OLLAMA_HOST", "0.0.0.0:11434").rpartition(":")
    settings = " ".join(f"{key}:{os.environ[key]}" for key in sorted(os.environ) if key.startswith("OLLAMA_"))
    slog("server config", env=f"map[{settings}]")
    misbehave(0)
    (MODELS / "blobs").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, end)
    server = ThreadingHTTPServer((host, int(port)), Api)
    slog(f"Listening on [::]:{server.server_port} (version {VERSION})")
    server.serve_forever()


def hold(megabytes: str) -> None:
    """Take memory and keep it."""
    block = bytearray(int(megabytes) << 20)
    block[::4096] = b"x" * len(block[::4096])
    os.write(1, b"holding\n")
    time.sleep(1 << 30)


if __name__ == "__main__":
    if sys.argv[1] == "--version":
        os.write(1, f"ollama version is {VERSION}\n".encode())
        sys.exit()
    if sys.argv[1] == "serve":
        serve()
    hold(sys.argv[2])
