"""A llama-server "for CUDA" of which every figure is set: it logs a device CUDA0 and has the stand-in driver show the memory.

Standard library only; started as an engine binary through the script that :func:`write_cuda_program` makes. It places layers as
llama.cpp does: as many as leave ``--fit-target`` of what is free, from the back.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

MIB: Final = 1 << 20
TOTAL: Final = 24 << 30
NAME: Final = "NVIDIA Test A"
#: Bytes: a driver's context, what the first real batch adds by batch, and the parts of a model of two layers.
CONTEXT: Final = 300 * MIB
POOL: Final = {512: 2 * MIB, 1024: 4 * MIB, 2048: 8 * MIB}
LAYERS: Final = 2
WEIGHTS: Final = 2 * MIB
OUTPUT: Final = MIB
KV_PER_TOKEN: Final = 512
COMPUTE: Final = 20 * MIB


def write_cuda_program(path: Path, processes: Path) -> Path:
    """An executable that acts as a CUDA llama-server; ``processes`` is the folder that the stand-in driver reads."""
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{Path(__file__).resolve()}' '{processes}' \"$@\"\n")
    path.chmod(0o755)
    return path


def needed(layers: int, cells: int, batch: int) -> dict[str, int]:
    """Bytes on the GPU with so many layers there, the output among them."""
    repeating = max(layers - 1, 0)
    return {
        "model": repeating * WEIGHTS + (OUTPUT if layers else 0),
        "KV": repeating * KV_PER_TOKEN * cells,
        "compute": COMPUTE + 2 * batch * cells,
    }


def place(free: int, target: int, cells: int, batch: int, forced: int | None) -> int:
    """Layers on the GPU."""
    if forced is not None:
        return min(forced, LAYERS + 1)
    fitting = [n for n in range(LAYERS + 2) if sum(needed(n, cells, batch).values()) <= free - target]
    return max(fitting, default=0)


def log(layers: int, cells: int, slots: int, batch: int, free: int, model: str) -> str:
    """A load as llama-server b10434 tells it."""
    parts = needed(layers, cells, batch)
    model_mib, kv_mib, compute_mib = (parts[name] / MIB for name in ("model", "KV", "compute"))
    used = sum(parts.values()) // MIB
    lines = [
        f"srv    load_model: loading model '{model}'",
        "common_params_fit_impl: getting device memory data for initial parameters:",
        "common_memory_breakdown_print: | memory breakdown [MiB] | total  free  self  model  context  compute  unaccounted |",
        f"common_memory_breakdown_print: |   - CUDA0 ({NAME}) | {TOTAL // MIB} = {free // MIB} + ( {used} = {model_mib:.0f} + "
        f"{kv_mib:.0f} + {compute_mib:.0f}) + {(TOTAL - free) // MIB - used} |",
        f"common_params_fit_impl: projected to use {used} MiB of device memory vs. {free // MIB} MiB of free device memory",
        "common_fit_params: successfully fit params to free device memory",
        f"load_tensors: offloaded {layers}/{LAYERS + 1} layers to GPU",
        f"load_tensors:        CUDA0 model buffer size = {model_mib:8.2f} MiB",
        f"llama_context: n_seq_max             = {slots}",
        f"llama_context: n_ctx                 = {cells}",
        f"llama_context: n_ctx_seq             = {cells // slots}",
        f"llama_context: n_ubatch              = {batch}",
        f"llama_kv_cache:      CUDA0 KV buffer size = {kv_mib:8.2f} MiB",
        f"llama_kv_cache: size = {kv_mib:7.2f} MiB ({cells // slots:6} cells, {LAYERS:3} layers, {slots:2}/{slots} seqs), "
        f"K (f16): {kv_mib / 2:7.2f} MiB, V (f16): {kv_mib / 2:7.2f} MiB",
        "resolve_fused_ops: Flash Attention enabled",
        f"sched_reserve:      CUDA0 compute buffer size = {compute_mib:8.2f} MiB",
        "srv          init: model loaded",
    ]
    return "\n".join(lines) + "\n"


class Answers(BaseHTTPRequestHandler):
    grow: Any = None

    def do_GET(self) -> None:
        self._send({"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, tokens = len(asked["prompt"]), asked["n_predict"]
        Answers.grow(prompt)
        timings = {"prompt_n": prompt, "prompt_ms": prompt / 8, "predicted_n": tokens, "predicted_ms": 10.0 * tokens}
        self._send({"content": "", "timings": timings})

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main(processes: Path, arguments: list[str]) -> None:
    held = sum(int(one.read_text()) for one in processes.iterdir() if one.name.isdigit() and Path("/proc", one.name).exists())
    free = TOTAL - held - CONTEXT
    if "--version" in arguments:
        sys.stdout.write("version: 10434 (stand-in)\n")
        return
    if "--list-devices" in arguments:
        sys.stdout.write(f"Available devices:\n  CUDA0: {NAME} ({TOTAL // MIB} MiB, {free // MIB} MiB free)\n")
        return

    def given(name: str, default: str | None = None) -> str | None:
        return arguments[arguments.index(name) + 1] if name in arguments else default

    cells, slots, batch = (int(given(name) or 0) for name in ("-c", "-np", "-ub"))
    forced = given("-ngl")
    layers = place(free, 1024 * MIB, cells, batch, None if forced is None else int(forced))
    mine = processes / str(os.getpid())

    def hold(size: int) -> None:
        part = processes / f"part-{os.getpid()}"
        part.write_text(str(size))
        part.replace(mine)

    loaded = CONTEXT + sum(needed(layers, cells, batch).values())
    hold(loaded)
    Answers.grow = lambda prompt: hold(loaded + POOL[batch]) if prompt >= batch else None
    sys.stdout.write(log(layers, cells, slots, batch, free, given("--model") or ""))
    server = HTTPServer((given("--host") or "", int(given("--port") or 0)), Answers)
    sys.stdout.write(f"main: server is listening on http://{given('--host')}:{given('--port')}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
