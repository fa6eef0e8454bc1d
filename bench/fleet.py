"""What a cluster costs and gains: ``python -m bench.fleet``.

Ray's cluster utility on this machine. The overhead: cells on a fleet of one node against the same cells here. The speed-up:
cells whose engine waits ``--wait`` seconds before it starts, so that nodes on few cores do not stand in each other's way.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CELLS = 6


def sweep(plan: Path, store: Path, *more: str) -> tuple[float, list[float]]:
    """Seconds of the whole command, and of each cell by itself."""
    command = [sys.executable, "-m", "harness", "sweep", str(plan), "--store", str(store), "--json", *more]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    spent = time.monotonic() - began
    return spent, [cell["seconds"] for cell in json.loads(done.stdout)["data"]["cells"]]


def cluster_of(nodes: int) -> Any:
    from ray.cluster_utils import Cluster

    environment = {"PYTHONPATH": str(ROOT)}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "env_vars": environment})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, resources={"any": 1}, env_vars=environment)
    return cluster


def main() -> None:
    from tests.support.models import write_tiny_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wait", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [str(write_tiny_llama(folder / f"tiny{number}.gguf")) for number in range(CELLS)]
        from harness.engines.llama_server.recipe import find_command

        waiting = folder / "waiting-llama-server"
        waiting.write_text(
            f"#!/bin/sh\ncase $* in *--list-devices*|*--version*) ;; *) sleep {options.wait};; esac\n"
            f'exec {shlex.join(find_command(None))} "$@"\n'
        )
        waiting.chmod(0o755)
        base = "engine: llama-server, sandbox: process, gpus: none, speed: false, ctx: '1024,2048', machine: any"
        quick, slow = folder / "quick.yaml", folder / "slow.yaml"
        quick.write_text(f"defaults: {{{base}}}\nmatrix: {{model: {json.dumps(models)}}}\n")
        slow.write_text(f"defaults: {{{base}, engine_binary: '{waiting}'}}\nmatrix: {{model: {json.dumps(models)}}}\n")
        here, own = sweep(quick, folder / "here")
        print(f"{CELLS} cells here: {here:.1f} s ({sum(own) / CELLS:.1f} s a cell)")
        first = None
        for nodes in (1, 2, 3):
            cluster = cluster_of(nodes)
            try:
                if nodes == 1:
                    there, own = sweep(quick, folder / "there", "--ray", cluster.address)
                    print(f"{CELLS} cells on one node: {there:.1f} s; {(there - here) / CELLS:+.2f} s a cell over here")
                spent, _ = sweep(slow, folder / f"slow{nodes}", "--ray", cluster.address)
                first = first or spent
                print(f"{CELLS} waiting cells on {nodes} nodes: {spent:.1f} s, {first / spent:.2f} times as fast as on one")
            finally:
                cluster.shutdown()


if __name__ == "__main__":
    main()
