"""A sweep over three nodes of a Ray cluster on this machine: Ray's own cluster utility, real engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.store.store import Store
from harness.sweep.run import load_plan
from tests.support.background import engines_of
from tests.support.models import write_tiny_llama
from tests.support.waiting import until

pytestmark = [
    pytest.mark.requires("ray", "embedded"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
ROOT = Path(__file__).parents[2]
KINDS = ("alpha", "beta", "gamma")
_ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


class Fleet:
    """A head without work, and a node of each kind."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "env_vars": _ENVIRONMENT})
        self.nodes = {kind: self.add(kind) for kind in KINDS}

    def add(self, kind: str) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={kind: 1}, env_vars=_ENVIRONMENT)

    def command(self, plan: Path, store: Path, *more: str) -> list[str]:
        address = ["--ray", self.cluster.address]
        return [sys.executable, "-m", "harness", "sweep", str(plan), "--store", str(store), "--json", *address, *more]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.cluster.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


def write_plan(path: Path, model: Path, more: str = "") -> Path:
    path.write_text(
        f"""
        defaults: {{engine: llama-server, sandbox: process, gpus: none, speed: false, ctx: '1024,2048,4096'}}
        matrix: {{model: ['{model}'], kv_cache_type: [f16, q8_0], num_batch: [256, 512], machine: [alpha, beta, gamma]}}
        {more}
        """
    )
    return path


def sweep(*command: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, answer


def test_a_fleet_measures_what_one_machine_measures_and_reports_a_poisoned_cell(
    fleet: Fleet, model: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path / "plan.yaml", model, f"include: [{{model: '{tmp_path}/absent.gguf', machine: beta}}]")
    there, here = Store(tmp_path / "there"), Store(tmp_path / "here")

    status, answer = sweep(*fleet.command(plan, there.root))

    assert status == 66
    assert [cell["status"] for cell in answer["data"]["cells"]].count("done") == 12
    assert [error["code"] for error in answer["errors"]] == ["no-such-file"]
    assert len(list(there.runs())) == 12
    sweep(sys.executable, "-m", "harness", "sweep", str(plan), "--store", str(here.root), "--json")
    local = {path.name.removesuffix(".yaml"): here.read(path) for path in here.paths()}
    assert len(local) == 4
    for path in there.paths():
        found = there.read(path)
        stem, _, variant = path.name.removesuffix(".yaml").partition("@")
        settings = "-".join(part for part in variant.split("-") if part not in KINDS)
        same = local[f"{stem}@{settings}" if settings else stem]
        allowed = (found.metadata.quality.max_error or 0.0) + (same.metadata.quality.max_error or 0.0)
        assert found.constants.base_vram_gb == pytest.approx(same.constants.base_vram_gb, rel=allowed + 0.005)
        assert found.constants.kv_cache_gb_per_10k == same.constants.kv_cache_gb_per_10k


def test_a_cell_whose_node_dies_runs_again_where_its_kind_comes_back(
    fleet: Fleet, model: Path, engine_bin: Path, tmp_path: Path
) -> None:
    """The engine's loads are held back until the node is gone."""
    import ray

    from harness.sweep.ray import on_cluster

    gate, held = tmp_path / "gate", tmp_path / "llama-server"
    held.write_text(
        f'#!/bin/sh\ncase "$*" in *{model}*) while [ ! -e {gate} ]; do sleep 0.1; done ;; esac\nexec {engine_bin} "$@"\n'
    )
    held.chmod(0o755)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"matrix: {{model: ['{model}'], machine: [gamma]}}\n"
        "defaults: {engine: llama-server, sandbox: process, gpus: none, speed: false, ctx: '1024,2048,4096',\n"
        f"           engine_binary: '{held}'}}\n"
    )
    # To the head: a driver dies with the node that it is connected to.
    fleet.cluster.connect()
    try:
        run = on_cluster(fleet.cluster.address, Store(tmp_path / "store"))
        with ThreadPoolExecutor(1) as pool:
            outcomes = pool.submit(lambda: list(run(load_plan(plan, here=False))))
            until(lambda: bool(engines_of(model)) or outcomes.done(), "the cell's engine runs")
            fleet.cluster.remove_node(fleet.nodes["gamma"], allow_graceful=False)
            until(lambda: not engines_of(model), "its engine ends with the node")
            assert not outcomes.done()
            gate.touch()
            fleet.nodes["gamma"] = fleet.add("gamma")
            (outcome,) = outcomes.result(timeout=200)
    finally:
        ray.shutdown()

    assert outcome.status == "done", outcome.problem
    assert (tmp_path / "store/llama-server/tiny@gamma.yaml").is_file()


@pytest.mark.timeout(900)  # twelve cells on a machine that does other things, too
def test_a_killed_driver_leaves_nothing_running_and_is_resumed(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    fleet.cluster.wait_for_nodes()  # a driver may else be given the node that has just died
    plan, store = write_plan(tmp_path / "plan.yaml", model), tmp_path / "store"
    with subprocess.Popen(
        fleet.command(plan, store), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        cells = store / "sweeps" / "plan"
        until(lambda: len(list(cells.glob("*.json"))) >= 2 or process.poll() is not None, "two cells are done", 400)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    kept = {path.name for path in store.glob("sweeps/plan/*.json")}
    until(lambda: not engines_of(model), "no engine of it runs on")

    status, answer = sweep(*fleet.command(plan, store, "--resume"))

    assert status == 0
    assert len(answer["data"]["cells"]) == 12 - len(kept)
    assert len(list(Store(store).paths())) == 12


def test_a_kind_that_no_node_offers_is_reported(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"include: [{{model: '{model}', machine: h100}}]")
    script = (
        "import sys; from pathlib import Path; from harness.store.store import Store; "
        "from harness.sweep.ray import on_cluster; from harness.sweep.run import load_plan; "
        "cells = load_plan(Path(sys.argv[1]), here=False); "
        "run = on_cluster(sys.argv[2], Store(Path(sys.argv[3])), patience=0.5); "
        "print([one.problem.code for one in run(cells)])"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(plan), fleet.cluster.address, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["['no-such-machine']"]
