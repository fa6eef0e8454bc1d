"""Cells of a sweep on a Ray cluster: Ray places, retries and ends them; harness calibrates on the node where one lands.

A cell reserves one unit of the custom resource that its ``machine`` names (``ray start --resources='{"rtx3090": 1}'``), or else
one GPU where the cluster has GPUs. It calibrates into a folder of its own there and returns the files, so nodes share nothing.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from harness import __version__
from harness.errors import UnavailableError
from harness.installation import install_hint
from harness.measure.events import Observer
from harness.store.store import RUNS, Store, write_atomically
from harness.sweep.matrix import Cell
from harness.sweep.run import CellOutcome, CellRunner, Problem, run_cell

#: How often a cell runs again when its node or its worker dies.
RETRIES: Final = 3
#: How long a cell waits for a node of its kind to join before it is reported, seconds.
PATIENCE: Final = 60.0
_TICK: Final = 1.0

Files = dict[str, bytes]


def on_cluster(address: str, store: Store, *, patience: float = PATIENCE) -> CellRunner:
    """Run cells on the cluster at ``address`` (``auto``: the one that this machine belongs to).

    Raises:
        UnavailableError: Ray is not installed, the cluster does not answer, or a node has another version of harness.
    """
    try:
        import ray
    except ImportError as error:
        raise UnavailableError(
            "sweeps over a cluster need Ray",
            hint=install_hint("fleet"),
            code="no-ray",
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise UnavailableError(f"no Ray cluster answers at {address}: {error}", code="ray-absent") from error
    _check_versions(ray)

    def run(cells: Sequence[Cell]) -> Iterator[CellOutcome]:
        return _run(ray, cells, store, patience)

    return run


def _check_versions(ray: Any) -> None:
    """Every node must have this very harness: a cell would otherwise be measured by another program."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At

    ask = ray.remote(num_cpus=0)(_version)
    asked = [
        (node["NodeManagerHostname"], ask.options(scheduling_strategy=At(node["NodeID"], soft=False)).remote())
        for node in ray.nodes()
        if node["Alive"]
    ]
    wrong = []
    for name, reference in asked:
        try:
            found = ray.get(reference, timeout=PATIENCE)
        except ray.exceptions.RayError as error:
            found = f"none that runs ({type(error).__name__})"
        if found != __version__:
            wrong.append(f"{name}: {found}")
    if wrong:
        raise UnavailableError(
            f"nodes have another harness than {__version__}: {', '.join(sorted(wrong))}",
            hint="install the same version on every node",
            code="ray-versions",
        )


def _version() -> str:
    from harness import __version__ as found

    return found


def _run(ray: Any, cells: Sequence[Cell], store: Store, patience: float) -> Iterator[CellOutcome]:
    task = ray.remote(max_retries=RETRIES)(_calibrate_there)
    waiting: dict[Any, Cell] = {}
    missing_since: dict[str, float] = {}
    for cell in cells:
        waiting[task.options(**_needs(ray, cell)).remote(cell)] = cell
    try:
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1, timeout=_TICK)
            for reference in ended:
                cell = waiting.pop(reference)
                yield _collect(ray, reference, cell, store)
            for reference, cell in list(waiting.items()):
                if _nowhere(ray, cell, missing_since, patience):
                    ray.cancel(reference, force=True)
                    waiting.pop(reference)
                    yield _failed(cell, "no-such-machine", f"no node of the cluster offers {cell.machine!r}", 69)
    finally:
        for reference in waiting:  # interrupted: what runs is ended on its node, and the engine with it
            ray.cancel(reference, force=True)


def _needs(ray: Any, cell: Cell) -> dict[str, Any]:
    if cell.machine is not None:
        return {"num_cpus": 0, "resources": {cell.machine: 1}}
    if cell.gpus != "none" and ray.cluster_resources().get("GPU"):
        return {"num_cpus": 0, "num_gpus": 1}
    return {"num_cpus": 1}


def _nowhere(ray: Any, cell: Cell, since: dict[str, float], patience: float) -> bool:
    """Whether no node has offered the cell's kind for too long (Ray itself would wait for ever)."""
    kind = cell.machine
    if kind is None:
        return False
    if ray.cluster_resources().get(kind):
        since.pop(kind, None)
        return False
    return time.monotonic() - since.setdefault(kind, time.monotonic()) > patience


def _calibrate_there(cell: Cell) -> tuple[CellOutcome, Files]:
    """On a node: calibrate, and return the outcome with the files of its run and its artifact, by paths in the store."""
    import platform

    with tempfile.TemporaryDirectory(prefix="harness-cell-") as name:
        store = Store(Path(name))
        outcome = run_cell(cell, store, Path.cwd(), Observer())
        files = {
            str(path.relative_to(store.root)): path.read_bytes()
            for path in sorted(store.root.rglob("*"))
            if path.is_file() and (RUNS in path.parts or path.suffix == ".yaml") and not path.name.startswith(".")
        }
        relative = {
            field: str(Path(value).relative_to(store.root))
            for field in ("artifact", "record")
            if (value := getattr(outcome, field)) is not None
        }
        return msgspec.structs.replace(outcome, **relative, node=platform.node()), files


def _collect(ray: Any, reference: Any, cell: Cell, store: Store) -> CellOutcome:
    try:
        outcome, files = ray.get(reference)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {said[0] if said else 'no reason given'}"
        return _failed(cell, "node-lost", f"its node or worker was lost {RETRIES + 1} times: {why}", 75)
    for name, data in files.items():
        if ".." not in Path(name).parts and not Path(name).is_absolute():
            write_atomically(store.root / name, data)
    here = {
        field: str(store.root / value) for field in ("artifact", "record") if (value := getattr(outcome, field)) is not None
    }
    found: CellOutcome = msgspec.structs.replace(outcome, **here, cell=cell)
    return found


def _failed(cell: Cell, code: str, message: str, exit_code: int) -> CellOutcome:
    problem = Problem(code=code, message=message, hint=None, exit_code=exit_code)
    return CellOutcome(cell=cell, status="failed", started_at="", seconds=0.0, problem=problem)
