"""A stand-in for llama-server whose figures are set: it logs them, takes that memory, and answers at that speed.

Two of them that differ in one figure act out an upgrade. Standard library only; started as an engine binary through the
script that :func:`write_stand_in` makes.
"""

from __future__ import annotations

import json
import mmap
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

#: Figures of an engine and model: MiB, bytes a token, tokens a second. ``hidden_mib`` is memory that no log line names;
#: ``compute_per_token`` is that of a batch of 512, as a mask's is.
FIGURES: Final[dict[str, Any]] = {
    "version": "b1",
    "weights_mib": 12.0,
    "window_mib": 3.0,
    "kv_per_token": 3072,
    "compute_mib": 4.0,
    "compute_per_token": 1024,
    "hidden_mib": 2.0,
    "decode_per_s": 50.0,
    "prompt_per_s": 800.0,
}
_MIB: Final = 1 << 20


def write_stand_in(path: Path, **changes: Any) -> Path:
    """An executable that acts as llama-server with these figures."""
    figures = {**FIGURES, **changes}
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{Path(__file__).resolve()}' '{json.dumps(figures)}' \"$@\"\n")
    path.chmod(0o755)
    return path


def log(figures: dict[str, Any], context: int, slots: int, batch: int) -> tuple[list[str], int]:
    """The lines of a load as llama-server b10434 prints them, and the bytes that it takes."""
    kv, window = figures["kv_per_token"] * context, figures["window_mib"] * _MIB * slots
    compute = figures["compute_mib"] * _MIB + figures["compute_per_token"] * batch // 512 * context // slots
    lines = [
        "load_tensors: loading model tensors, this can take a while... (load_mode = none)",
        "load_tensors: offloaded 0/3 layers to GPU",
        f"load_tensors:          CPU model buffer size = {figures['weights_mib']:8.2f} MiB",
        f"llama_context: n_seq_max             = {slots}",
        f"llama_context: n_ctx                 = {context}",
        f"llama_context: n_ctx_seq             = {context // slots}",
        f"llama_context: n_ubatch              = {batch}",
        f"llama_kv_cache_iswa: creating non-SWA KV cache, size = {context // slots} cells",
        f"llama_kv_cache:        CPU KV buffer size = {kv / _MIB:8.2f} MiB",
        f"llama_kv_cache: size = {kv / _MIB:7.2f} MiB ({context // slots:6} cells,   3 layers, {slots:2}/{slots} seqs), "
        f"K (f16): {kv / 2 / _MIB:7.2f} MiB, V (f16): {kv / 2 / _MIB:7.2f} MiB",
        "llama_kv_cache_iswa: creating     SWA KV cache, size = 1024 cells",
        f"llama_kv_cache:        CPU KV buffer size = {window / _MIB:8.2f} MiB",
        f"llama_kv_cache: size = {window / _MIB:7.2f} MiB (  1024 cells,  15 layers, {slots:2}/{slots} seqs), "
        f"K (f16): {window / 2 / _MIB:7.2f} MiB, V (f16): {window / 2 / _MIB:7.2f} MiB",
        "resolve_fused_ops: Flash Attention enabled",
        f"sched_reserve:        CPU compute buffer size = {compute / _MIB:8.2f} MiB",
        "srv          init: model loaded",
    ]
    return lines, round(figures["weights_mib"] * _MIB + kv + window + compute + figures["hidden_mib"] * _MIB)


class Answers(BaseHTTPRequestHandler):
    figures: dict[str, Any] = {}  # noqa: RUF012 - set once, before the server starts

    def do_GET(self) -> None:
        self._send({"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, tokens = len(asked["prompt"]), asked["n_predict"]
        timings = {
            "prompt_n": prompt,
            "prompt_ms": 1000 * prompt / self.figures["prompt_per_s"],
            "predicted_n": tokens,
            "predicted_ms": 1000 * tokens / self.figures["decode_per_s"],
        }
        self._send({"content": "", "timings": timings})

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main(figures: dict[str, Any], arguments: list[str]) -> None:
    if "--version" in arguments:
        sys.stdout.write(f"version: {figures['version']} (stand-in)\n")
        return
    if "--list-devices" in arguments:
        sys.stdout.write("Available devices:\n")
        return

    def given(name: str) -> str:
        return arguments[arguments.index(name) + 1]

    lines, size = log(figures, int(given("-c")), int(given("-np")), int(given("-ub")))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    Answers.figures = figures
    server = HTTPServer((given("--host"), int(given("--port"))), Answers)
    sys.stdout.write(f"srv    load_model: loading model '{given('--model')}'\n")
    sys.stdout.write("\n".join(lines) + f"\nmain: server is listening on http://{given('--host')}:{given('--port')}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
