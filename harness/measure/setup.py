"""Where an engine runs and what measures it: held for a run, closed after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from harness.engines.base import Engine, Options
from harness.errors import UnavailableError
from harness.inventory.backend import Backend, elsewhere
from harness.measure.events import Observer
from harness.meters.base import Meter
from harness.sandboxes.base import Sandbox

if TYPE_CHECKING:
    from harness.sandboxes.reaper import Reaper


@contextmanager
def opened(engine: Engine, choice: Backend, options: Options, observer: Observer) -> Iterator[tuple[Sandbox, Meter]]:
    """The sandbox of a choice, with the reaper that outlives us, and its meter.

    Raises:
        UnavailableError: Docker or the meter's driver cannot be had.
    """
    from harness.sandboxes.reaper import Reaper  # POSIX only, and this module is read elsewhere too

    with Reaper() as reaper:
        try:
            sandbox = _sandbox(choice, reaper, observer)
        except UnavailableError as error:
            if error.code.startswith("docker-"):
                error.hint = elsewhere(engine, options, error.hint)
            raise
        with closing(sandbox), closing(open_meter(choice)) as meter:
            yield sandbox, meter


def _sandbox(choice: Backend, reaper: Reaper, observer: Observer) -> Sandbox:
    if choice.sandbox == "process":
        from harness.sandboxes.process import ProcessSandbox

        return ProcessSandbox(reaper)
    from harness.sandboxes.docker import DockerSandbox

    return DockerSandbox(reaper, progress=observer.progress)


def open_meter(choice: Backend) -> Meter:
    """The meter of a choice."""
    uuids = [gpu.uuid for gpu in choice.gpus if gpu.uuid]
    if choice.meter == "host":
        from harness.meters.host import HostMeter

        return HostMeter()
    if choice.meter == "log":
        from harness.meters.log import LogMeter

        return LogMeter()
    if choice.meter == "drm":
        from harness.meters.drm import DrmMeter

        return DrmMeter(uuids)
    from harness.meters.nvml import NvmlMeter

    return NvmlMeter(uuids)


def lock_names(choice: Backend) -> tuple[str, ...]:
    """What a run must have to itself: its GPUs, by UUID, or by name where they have none.

    Host memory is shared: what a process holds there is its own, whatever others do.
    """
    return tuple(gpu.uuid or gpu.name for gpu in choice.gpus)
