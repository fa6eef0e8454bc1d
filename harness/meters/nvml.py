"""The driver's own figure: memory of processes by device, from NVML (nvidia-ml-py 13).

NVML reports PIDs of the host, so it is asked on the host. A figure that cannot be had is ``None`` with a reason, never
0: N/A (WDDM), 0 for a process that holds a context (some drivers inside containers), not supported (MIG, WSL2), not
permitted, and an empty list although the engine runs are five different answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import msgspec

from harness.core.trace import MeterName, Reading
from harness.errors import NotFoundError, NotPermittedError, UnavailableError, UntrustedError

#: NVML's return codes (nvml.h, ``nvmlReturn_t``).
_NOT_SUPPORTED: Final = 3
_NO_PERMISSION: Final = 4
_INSUFFICIENT_SIZE: Final = 7
_GPU_IS_LOST: Final = 15
_RESET_REQUIRED: Final = 16
_TRIES: Final = 3
_LISTS: Final = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One NVIDIA GPU; ``memory_bytes`` is ``None`` on unified-memory machines."""

    index: int
    uuid: str
    name: str
    memory_bytes: int | None
    driver: str | None


@contextmanager
def _nvml() -> Iterator[Any]:
    """The library, initialised.

    Raises:
        UnavailableError, NotPermittedError: it is not there, or says no.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value == _NO_PERMISSION:
            raise NotPermittedError(f"NVML does not answer us: {error}") from error
        raise UnavailableError(f"there is no NVIDIA driver to ask: {error}", code="no-nvml") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:  # the caller has dealt with what it expects of a single GPU
        raise UnavailableError(f"the NVIDIA driver does not answer: {error}", code="no-nvml") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def gpus() -> list[Gpu]:
    """All NVIDIA GPUs that answer, in the driver's order.

    Raises:
        UnavailableError, NotPermittedError: the driver cannot be asked.
    """
    with _nvml() as nvml:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid, name = str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle))
            except nvml.NVMLError:
                continue  # a GPU that fell off the bus; the others answer
            found.append(Gpu(index=index, uuid=uuid, name=name, memory_bytes=_memory(nvml, handle, "total"), driver=driver))
        return found


def free_bytes(uuid: str) -> int | None:
    """Free memory of a GPU now; ``None`` where the driver does not say.

    Raises:
        UnavailableError, NotPermittedError: the driver cannot be asked. NotFoundError: no such GPU.
    """
    with _nvml() as nvml:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            raise NotFoundError(f"the driver knows no GPU {uuid}: {error}", code="no-such-gpu") from error
        return _memory(nvml, handle, "free")


def _memory(nvml: Any, handle: Any, field: str) -> int | None:
    try:
        return int(getattr(nvml.nvmlDeviceGetMemoryInfo(handle), field))
    except nvml.NVMLError:
        return None


class NvmlMeter:
    """Memory of the engine's processes on the GPUs named by UUID.

    Raises:
        UnavailableError, NotPermittedError: the driver cannot be asked. NotFoundError: no such GPU.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._context = _nvml()
        self._nvml = self._context.__enter__()
        try:
            self._handles = {uuid: self._nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
        except self._nvml.NVMLError as error:
            self.close()
            raise NotFoundError(f"the driver knows no such GPU: {error}", code="no-such-gpu") from error

    @property
    def name(self) -> MeterName:
        """``nvml``."""
        return "nvml"

    @property
    def interval(self) -> float:
        """4 Hz: the process list takes the driver's global lock for milliseconds."""
        return 0.25

    def read(self, pids: frozenset[int]) -> Reading:
        """Sum of ``pids`` over the devices; other processes there are strangers.

        Raises:
            UntrustedError: a GPU was lost, so the run is void.
        """
        devices: dict[str, int] = {}
        strangers: dict[int, int | None] = {}
        for uuid, handle in self._handles.items():
            used = self._processes(handle)
            if isinstance(used, str):
                return Reading(total_bytes=None, reason=used)
            mine = {pid: size for pid, size in used.items() if pid in pids}
            strangers |= {pid: size for pid, size in used.items() if pid not in pids}
            if any(size is None for size in mine.values()):
                return Reading(total_bytes=None, reason="the driver gives no memory by process (N/A)", strangers=strangers)
            if any(size == 0 for size in mine.values()):
                return Reading(
                    total_bytes=None, reason="the driver reports 0 bytes for a process with a context", strangers=strangers
                )
            if mine:
                devices[uuid] = sum(size or 0 for size in mine.values())
        if not devices:
            return Reading(total_bytes=None, reason="none of the engine's processes is on the GPU", strangers=strangers)
        return Reading(total_bytes=sum(devices.values()), devices=devices, strangers=strangers)

    def _processes(self, handle: Any) -> dict[int, int | None] | str:
        """PID to bytes, every list merged (a process stands in several, with one figure); or why not."""
        merged: dict[int, int | None] = {}
        for name in _LISTS:
            answer = self._list(name, handle)
            if isinstance(answer, str):
                if name == _LISTS[0]:
                    return answer
                continue  # MPS or graphics lists are not everywhere
            for process in answer:
                size = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
                known = merged.get(int(process.pid))
                merged[int(process.pid)] = size if known is None else max(known, size or 0)
        return merged

    def _list(self, name: str, handle: Any) -> list[Any] | str:
        nvml = self._nvml
        call: Callable[[Any], list[Any]] = getattr(nvml, name)
        for _ in range(_TRIES):
            try:
                return list(call(handle))
            except nvml.NVMLLibraryMismatchError:
                call = getattr(nvml, f"{name}_v2")  # a driver before 510
            except nvml.NVMLError as error:
                if error.value in (_GPU_IS_LOST, _RESET_REQUIRED):
                    raise UntrustedError(f"a GPU was lost during the run: {error}", code="gpu-lost") from error
                if error.value == _NOT_SUPPORTED:
                    return "the driver does not support memory by process here"
                if error.value == _NO_PERMISSION:
                    return "the driver does not permit us to see memory by process"
                if error.value != _INSUFFICIENT_SIZE:
                    return f"the driver does not answer: {error}"
        return "the driver's list of processes kept growing"

    def close(self) -> None:
        """Shut NVML down."""
        self._context.__exit__(None, None, None)
