"""A server of files by ranges that misbehaves on request, with Ollama's registry and the Hugging Face Hub's index."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
MODEL = "application/vnd.ollama.image.model"
PROJECTOR = "application/vnd.ollama.image.projector"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client that hangs up before the end is what some tests are about."""


class RangeServer:
    """``files`` by path; ``faults`` by path: a list of what goes wrong with the next requests, one each.

    ``sent`` counts the bytes of bodies; ``requests`` are (path, range, authorization).
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.documents: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.sent = 0
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_ollama(self, name: str, model: bytes, projector: bytes | None = None) -> str:
        """A model of Ollama's registry; its digest."""
        tag = name.rpartition(":")[2]
        place = f"/v2/library/{name.partition(':')[0]}"
        config = json.dumps({"model_format": "gguf", "model_family": "llama"}).encode()
        layers: list[tuple[str, bytes]] = [(MODEL, model)]
        layers += [] if projector is None else [(PROJECTOR, projector)]
        layers.append(("application/vnd.ollama.image.params", b'{"stop": ["</s>"]}'))
        for _, data in [("", config), *layers]:
            self.files[f"{place}/blobs/{digest_of(data)}"] = data
        document = {
            "schemaVersion": 2,
            "config": {"mediaType": "x", "digest": digest_of(config), "size": len(config)},
            "layers": [{"mediaType": kind, "digest": digest_of(data), "size": len(data)} for kind, data in layers],
        }
        self.documents[f"{place}/manifests/{tag}"] = (200, json.dumps(document).encode(), {})
        return digest_of(model)

    def add_repository(self, repository: str, files: dict[str, bytes], commit: str = "c" * 40) -> None:
        """A repository of the Hub: its index, and its files at one revision."""
        siblings = [
            {"rfilename": name, "size": len(data), "lfs": {"sha256": digest_of(data)[7:], "size": len(data), "pointerSize": 1}}
            for name, data in files.items()
        ]
        body = json.dumps({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []}).encode()
        json_type = {"content-type": "application/json"}
        for place in (f"/api/models/{repository}", f"/api/models/{repository}/revision/{commit}"):
            self.documents[place] = (200, body, json_type)
        for name, data in files.items():
            self.files[f"/{repository}/resolve/{commit}/{name}"] = data


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner, path = self.owner, self.path.partition("?")[0]
        owner.requests.append((path, self.headers.get("range"), self.headers.get("authorization")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if path in owner.documents:
                status, body, headers = owner.documents[path]
                self._send(status, body, headers)
                return
            faults = owner.faults.get(path)
            fault = faults.pop(0) if faults else ""
            if path not in owner.files:
                self._send(404, b"", {})
                return
            self._file(owner.files[path], fault)

    def _file(self, data: bytes, fault: str) -> None:
        if fault.isdigit():
            self._send(int(fault), b"", {})
            return
        if fault.startswith(("http://", "https://", "/")):
            self._send(302, b"", {"location": fault})
            return
        found = _RANGE.fullmatch(self.headers.get("range") or "")
        if found is None or fault == "whole":
            self._send(200, data, {"etag": '"one"'})
            return
        start, end = int(found[1]), min(int(found[2]), len(data) - 1)
        if start >= len(data):
            self._send(416, b"", {"content-range": f"bytes */{len(data)}"})
            return
        tag = '"two"' if fault == "changed" else '"one"'
        said = {
            "content-range": f"bytes {start}-{end}/{len(data)}",
            "etag": tag,
        }
        part = data[start : end + 1]
        if fault == "wrong-start":
            said["content-range"] = f"bytes {start + 1}-{end}/{len(data)}"
        if fault == "other-size":
            said["content-range"] = f"bytes {start}-{end}/{len(data) * 2}"
        if fault == "more":
            part += b"?" * 1000
        if fault == "truncated":
            self.send_response(206)
            for name, value in said.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self._send(206, part, said)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.owner.sent += len(body)
        self.wfile.write(body)


@contextlib.contextmanager
def range_server() -> Iterator[RangeServer]:
    """One that runs."""
    server = RangeServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
