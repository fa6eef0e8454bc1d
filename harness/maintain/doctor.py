"""``harness doctor``: what works here, what does not, and what to do about it.

Every finding has a code; docs/how-to/gpu-box.md says of those that concern GPUs and containers what they mean.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import msgspec

from harness.engines.base import Options
from harness.engines.registry import EMBEDDED, engine_names, recipe_of
from harness.errors import HarnessError
from harness.inventory.gpus import has_device
from harness.inventory.machine import LocalMachine
from harness.maintain.doctor_drm import drm_findings, sleeping_nvidia
from harness.maintain.doctor_gpu import docker_findings, nvidia_findings
from harness.maintain.doctor_topology import topology_findings
from harness.measure.prepare import prepare
from harness.model.finding import Finding, Readiness
from harness.options import RunOptions
from harness.store.store import Store
from harness.units import format_size


def examine(store: Path) -> list[Finding]:
    """Look at everything; nothing is started but the engine's own ``--list-devices``."""
    asleep = list(sleeping_nvidia())  # before the driver is asked, which wakes them
    machine = LocalMachine()
    drm = drm_findings()
    nvidia = nvidia_findings(machine)
    if drm and not has_device():
        nvidia = [msgspec.structs.replace(one, state="note") for one in nvidia]  # this machine's GPUs are others'
    gpus = () if isinstance(machine.nvidia, HarnessError) else machine.nvidia
    embedded = [*recipe_of(EMBEDDED).findings(gpus), _devices()]
    others = [finding for name in engine_names() if name != EMBEDDED for finding in recipe_of(name).findings(gpus)]
    return [
        _platform(),
        *embedded,
        _memory(machine),
        _store(store),
        *asleep,
        *nvidia,
        *drm,
        *topology_findings(),
        *docker_findings(),
        *others,
    ]


def readiness(store: Store, here: Path) -> Readiness:
    """Whether `harness calibrate` would start here, on what, and what to do next."""
    try:
        session = prepare(RunOptions(), store, here)
        session.held.close()
    except HarnessError as error:
        return Readiness(works=False, text=error.message, next=error.hint)
    choice = session.choice
    where = ", ".join(gpu.name for gpu in choice.gpus) or "host memory"
    place = "Docker" if choice.sandbox == "docker" else "this machine"
    calibrated = any(True for _ in store.paths())
    text = f"{session.engine.name} on {place}, measuring {where}"
    return Readiness(works=True, text=text, next="harness plan" if calibrated else "harness calibrate")


def _platform() -> Finding:
    libc = " ".join(platform.libc_ver()).strip() or "unknown C library"
    text = f"{platform.machine()}, {libc}, Linux {platform.release()}"
    return Finding(subject="machine", code="machine", state="ok", text=text)


def _devices() -> Finding:
    subject = "embedded engine's GPUs"
    try:
        devices = recipe_of(EMBEDDED).devices(Options())
    except HarnessError as error:
        return Finding(subject=subject, code="engine-broken", state="missing", text=error.message, hint=error.hint)
    if not devices:
        return Finding(subject=subject, code="engine-no-gpu", state="note", text="none: its calibrations are of host memory")
    names = ", ".join(f"{gpu.key} ({gpu.name}, {format_size(gpu.total_bytes)})" for gpu in devices)
    return Finding(subject=subject, code="engine-gpus", state="ok", text=names)


def _memory(machine: LocalMachine) -> Finding:
    text = f"{format_size(machine.host_bytes)} available"
    return Finding(subject="host memory", code="host-memory", state="ok", text=text)


def _store(store: Path) -> Finding:
    folder = store
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        text = f"{store} cannot be written: what is in it answers, and nothing can be calibrated into it"
        return Finding(subject="store", code="store-read-only", state="note", text=text, hint="--store DIR, or HARNESS_STORE")
    return Finding(subject="store", code="store", state="ok", text=f"{store} ({format_size(free)} free)")
